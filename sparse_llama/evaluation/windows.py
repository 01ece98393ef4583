"""How a long sequence is cut into windows that a model can read, so that every token but the first is scored
exactly once.

Ours, the usual measure of published perplexities: window k reads the W tokens from k S on and predicts the
token after each; of windows but the first, the first W - S predictions are context only, because the window
before has made them. So every token has at least W - S tokens before it:

    W = 4, S = 2      reads 0 1 2 3      scores 1 2 3 4
                      reads 2 3 4 5      scores 5 6
                      reads 4 5 6        scores 7              (n = 8)

lm-evaluation-harness's (``lm_eval/utils.py``, ``get_rolling_token_windows`` with a context of 1, then
``make_disjoint_window``): windows of S = W, but the last one reads the W tokens before its end, so that the
few it scores have context:

    W = 4             reads 0 1 2 3      scores 1 2 3 4
                      reads 3 4 5 6      scores 5 6 7          (n = 8)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens [first, last) are read; of the predictions they make, the last ``num_scored`` count."""

    first: int
    last: int
    num_scored: int


def cut_windows(num_tokens: int, *, window: int, stride: int) -> list[Window]:
    """Return the windows over ``num_tokens``; the last one may be shorter."""
    assert 1 <= stride <= window
    windows: list[Window] = []
    num_predictions, scored = num_tokens - 1, 0  # the last token is predicted and never read
    while scored < num_predictions:
        first = len(windows) * stride
        last = min(first + window, num_predictions)
        windows.append(Window(first, last, last - scored))
        scored = last
    return windows


def cut_as_harness(num_tokens: int, *, window: int) -> list[Window]:
    """Return lm-evaluation-harness's windows over ``num_tokens``, of which the first is the prefix."""
    num_predictions = num_tokens - 1
    ends = range(window, num_predictions + window, window)
    return [
        Window(max(0, last - window), last, last - (end - window))
        for end in ends
        for last in [min(end, num_predictions)]
    ]
