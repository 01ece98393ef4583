"""Plan a run:  python launch/plan_memory.py --ds_config ds_configs/a100_40g.json --gpu_gib 40"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.plan_memory, cli.plan_memory_parser(__doc__))
