"""A loaded model becomes an engine."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.cli.checks import most_tokens
from mlx_ep.comm import Comm
from mlx_ep.comm.symmetry import check_alike
from mlx_ep.data_parallel import can_batch
from mlx_ep.models import compute_on_host
from mlx_ep.server.engine import ServingEngine
from mlx_ep.server.grammar import Grammars
from mlx_ep.server.kv import kv_sizes, why_not_shared
from mlx_ep.server.pools import EngineOptions, options_facts, share_memory
from mlx_ep.server.prefix_cache import PrefixCache
from mlx_ep.server.requests import Request
from mlx_ep.server.sampling import SequenceSampler
from mlx_ep.server.scheduler import RequestScheduler
from mlx_ep.server.sharing import measure_sharing
from mlx_ep.server.worker import Worker
from mlx_ep.types import TokenCounts

PROBE_TOKENS = 8  # of the pass that fills the caches once
NO_LIMIT = 2**31 - 1  # tokens of context, where the model does not say


def build_engine(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    comm: Comm,
    options: EngineOptions = EngineOptions(),  # noqa: B008, it is frozen
) -> ServingEngine:
    """An engine for an expert-parallel model; every rank must call it, then `run` it.

    How attention runs is how the model was made: ``data`` with a strategy for ranks
    with tokens of their own, else ``tensor`` or ``replicated``.

    Raises:
        ValueError: on every rank: the model cannot be served, or there is no memory.
    """
    check_alike(comm, options_facts(options), "All ranks must serve alike:")
    parallel = model.expert_parallel
    own_attention = bool(parallel.group.strategy.is_sharded)
    attention = "data" if own_attention else parallel.attention.attention
    if not can_batch(model):
        raise ValueError(
            "mlx-lm cannot run several sequences of this model at once (its KV cache "
            "does not merge); use mlx_ep.generate with it."
        )
    compute_on_host(model)
    caches, vocabulary = _probe(model, comm, own_attention)
    sizes, reason = kv_sizes(caches), why_not_shared(caches)
    pools = share_memory(options, comm, can_keep=not reason)
    owners = comm.size if own_attention else 1
    running = pools.running if own_attention else [min(pools.running)]
    kept = pools.kept if own_attention else [min(pools.kept)]
    prefixes = [PrefixCache(limit) for limit in kept]
    ends = sorted(tokenizer.eos_token_ids)
    special = tokenizer.encode("\n") + ends
    grammars = Grammars(tokenizer, ends)

    def make_sampler(request: Request) -> SequenceSampler:
        grammar = grammars.matcher(request.id, request.grammar)
        return SequenceSampler(request, special, grammar)

    scheduler = RequestScheduler(
        sizes,
        running,
        places=options.max_num_seqs,
        most_waiting=options.max_waiting,
        prefill_step=options.prefill_step,
        find=lambda owner, tokens: prefixes[owner].find(tokens),
    )
    assert len(prefixes) == owners
    sharing = measure_sharing(model, comm, vocabulary)
    notes = [f"attention: {attention}"]
    if text := str(sharing):
        notes.append(text)
    if reason:
        notes.append(f"no prefix cache: {reason}")
    return ServingEngine(
        comm,
        Worker(
            model,
            comm,
            sizes,
            own_attention,
            options.look_ahead,
            options.max_num_seqs,
            prefixes,
            ends,
            make_sampler,
            sharing,
        ),
        scheduler,
        pools=pools,
        options=options,
        attention=attention,
        context=options.context or most_tokens(model) or NO_LIMIT,
        vocabulary=vocabulary,
        grammars=grammars,
        notes=tuple(notes),
    )


def _probe(model: nn.Module, comm: Comm, own_attention: bool) -> tuple[list[Any], int]:
    """Caches behind a few tokens, and the width of the logits."""
    if own_attention:
        counts = TokenCounts((PROBE_TOKENS,) * comm.size)
        model.expert_parallel.group.step.tokens = counts
    caches = make_prompt_cache(model)
    logits = model(mx.zeros((1, PROBE_TOKENS), mx.int32), cache=caches)
    # sync: once, at the start.
    mx.eval(logits, [cache.state for cache in caches])
    return caches, logits.shape[-1]
