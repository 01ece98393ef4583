"""Compare variants of a run:  python launch/study.py --preset cpu_demo"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.study, cli.study_parser(__doc__))
