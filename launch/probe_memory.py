"""Measure a run at each ZeRO stage:  python launch/probe_memory.py --ds_config ds_configs/cpu_demo.json"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.probe_memory, cli.probe_memory_parser(__doc__))
