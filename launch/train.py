"""Train an adapter on a frozen LLaMA:  deepspeed launch/train.py --ds_config ds_configs/cpu_demo.json"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.train, cli.train_parser(__doc__))
