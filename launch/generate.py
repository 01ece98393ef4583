"""Answer a prompt:  python launch/generate.py --model bundled:tiny-llama --prompt 'Where does Ann live?'"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.generate, cli.generate_parser(__doc__))
