"""Export what a run trained:  python launch/export.py --checkpoint runs/cpu_demo --output exports/cpu_demo"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.export, cli.export_parser(__doc__))
