"""Both ranks prepare the same data; each says how many texts it tokenised and what it then reads."""

import json
import sys
from pathlib import Path

from sparse_llama.config.settings import Settings
from sparse_llama.data.prepare import prepare_data
from sparse_llama.data.tokenizer import SentencePieceTokenizer
from sparse_llama.distributed import ranks


class CountingTokenizer(SentencePieceTokenizer):
    num_calls = 0

    def encode(self, text: str) -> list[int]:
        self.num_calls += 1
        return super().encode(text)


def main(model: str, dataset: str, cache_dir: str) -> None:
    ranks.initialize()
    settings = Settings.parse({"data": {"dataset": dataset, "cache_dir": cache_dir}}, "sparse_llama")
    tokenizer = CountingTokenizer(Path(model))
    data = prepare_data(
        settings,
        tokenizer,
        align=1,
        micro_batch_size=1,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )
    rows = [batch.input_ids.sum().item() for batch in data.batches.step(0, 2)]
    result = {"calls": tokenizer.num_calls, "rows": rows, "tokens": data.ledger.training.tokens_read}
    print(f"RESULT {json.dumps(result)}", flush=True)
    ranks.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
