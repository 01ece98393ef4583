"""Measure a model:  python launch/evaluate.py --model bundled:tiny-llama --data bundled:people

Answers compared with their records, and kept:
  python launch/evaluate.py --model bundled:tiny-llama --data bundled:people --exact_match 9 --answers a.jsonl
A number hidden in long texts, by length and depth:
  python launch/evaluate.py --model bundled:tiny-llama --retrieval pairs --lengths 256,512 --png pairs.png
Perplexity of text, also by the position in the window:
  python launch/evaluate.py --model openlm-research/open_llama_3b --data wikitext2 --by_position
The same text as lm-evaluation-harness cuts it:
  python launch/evaluate.py --model openlm-research/open_llama_3b --data wikitext2 --partition harness
"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.evaluate, cli.evaluate_parser(__doc__))
