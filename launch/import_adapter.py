"""Take in another program's adapter:
python launch/import_adapter.py --adapter FILE --model bundled:tiny-llama --output adapters/theirs"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.import_adapter, cli.import_adapter_parser(__doc__))
