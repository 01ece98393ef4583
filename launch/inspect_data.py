"""See what a run would train on:  python launch/inspect_data.py --dataset bundled:people --records 2"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.inspect_data, cli.inspect_data_parser(__doc__))
