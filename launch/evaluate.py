"""Measure a model:  python launch/evaluate.py --model bundled:tiny-llama --data bundled:people"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.evaluate, cli.evaluate_parser(__doc__))
