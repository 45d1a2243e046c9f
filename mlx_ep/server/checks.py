"""What of a request is wrong, before it can disturb those of others. Pure."""

from __future__ import annotations

from mlx_ep.server.requests import Request, Sampling


def check_request(request: Request, vocabulary: int, context: int) -> None:
    """Raises:
    ValueError: what must hold, and what was given.
    """
    tokens, most = request.tokens, request.max_tokens
    if not tokens:
        raise ValueError("The prompt must have at least one token; it has none.")
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(
            f"Tokens of the prompt must be 0 to {vocabulary - 1}; got {wrong[0]}."
        )
    if most < 1:
        raise ValueError(f"max_tokens must be 1 or more; got {most}.")
    if len(tokens) + most > context:
        raise ValueError(
            f"Prompt and answer must fit the context of {context} tokens; the prompt "
            f"has {len(tokens)}, and {most} are asked for."
        )
    _check_sampling(request.sampling, vocabulary)


def _check_sampling(sampling: Sampling, vocabulary: int) -> None:
    for name, least, most in (
        ("temperature", 0, float("inf")),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("xtc_probability", 0, 1),
        ("xtc_threshold", 0, 0.5),
        ("repetition_penalty", 0, float("inf")),
        ("presence_penalty", float("-inf"), float("inf")),
        ("frequency_penalty", float("-inf"), float("inf")),
        ("top_k", 0, vocabulary - 1),
        ("top_logprobs", 0, vocabulary),
        ("repetition_context_size", 1, float("inf")),
        ("presence_context_size", 1, float("inf")),
        ("frequency_context_size", 1, float("inf")),
    ):
        value = getattr(sampling, name)
        if not least <= value <= most or value in (float("inf"), float("-inf")):
            raise ValueError(f"{name} must be {least} to {most}; got {value}.")
    for token in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"logit_bias must be of tokens 0 to {vocabulary - 1}; got {token}."
            )
