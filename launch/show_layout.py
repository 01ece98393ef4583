"""Draw a layout:  python launch/show_layout.py --sparse_attention fixed --seq_length 1024 --token 700"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.show_layout, cli.show_layout_parser(__doc__))
