"""Measure what a part costs:  python launch/benchmark.py attention --lengths 4096 --blocks 64"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.benchmark, cli.benchmark_parser(__doc__))
