"""Random exchanges over real ranks, each against the float64 loops.

    python -m tests.support.fuzz_exchange [--exchanges 10000] [--seed N] [--ranks 2,3,4]

Every rank draws the same cases from one seed. One that takes longer than --deadline
ends the run with the stacks of every rank; so does a sum that differs. Both name the
seed and the case, which `--seed` and `--first` repeat.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time

import mlx.core as mx
import numpy as np

from tests.support.cases import random_case
from tests.support.ranks import run_ranks
from tests.support.reference import moe_sum

STRATEGIES = ("gathered", "low_latency", "normal", "deepep", "auto")
FORMS = ("model", "model", "bf16", "int8", "mxfp8")
DTYPES = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def exchange(comm, seed):
    """One exchange, of everything that can be drawn; returns its description."""
    from mlx_ep import EPConfig, Placement
    from mlx_ep.exchange import STRATEGIES as TABLE
    from mlx_ep.kernels import ops
    from mlx_ep.metrics import Counters
    from mlx_ep.moe import ExpertGroup
    from mlx_ep.types import Routing

    random = np.random.default_rng(seed)
    num_experts, width = int(random.integers(1, 10)), int(random.integers(1, 9))
    owners = random.integers(0, comm.size, num_experts)
    placement = Placement(
        tuple(tuple(np.flatnonzero(owners == r).tolist()) for r in range(comm.size))
    )
    case = random_case(random, comm.size, num_experts)
    strategy = str(random.choice(STRATEGIES))
    dtype = str(random.choice(list(DTYPES)))
    most = 16 if strategy == "low_latency" else int(random.integers(1, 7))
    form = str(random.choice(FORMS))
    config = EPConfig(
        strategy=strategy,
        low_latency_tokens=most,
        round_tokens=most,
        dispatch_dtype=form,
    )
    weights = random.normal(size=(num_experts, width)).astype(np.float32)
    own = weights[list(placement.rank_experts[comm.rank])]
    is_agreed = bool(random.integers(2))
    x = np.random.default_rng([seed, comm.rank]).normal(
        size=(case.tokens[comm.rank], width)
    )
    tokens = mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))

    def run(rows, slots):
        return rows.astype(mx.float32) * mx.array(own)[slots]

    ids, gates = case.expert_ids[comm.rank], case.gates[comm.rank]
    routing = Routing(mx.array(ids), mx.array(gates))
    group = ExpertGroup(
        comm, placement, TABLE.create(config), Counters(), dispatch_dtype=form
    )
    if is_agreed:
        with group.agreed(len(x)):
            got = np.array(group.weighted_sum(tokens, routing, run))
    else:
        got = np.array(group.weighted_sum(tokens, routing, run))
    if form == "bf16":
        tokens = tokens.astype(mx.bfloat16).astype(tokens.dtype)
    elif form != "model":  # what the experts see is what is left of the tokens
        words = ops.quantize_rows(tokens, form)
        tokens = ops.dequantize_rows(words, form, width, tokens.dtype)
    exact = np.array(tokens.astype(mx.float32)).astype(np.float64)
    experts = [lambda row, w=w: row * w for w in weights.astype(np.float64)]
    expected = moe_sum(exact, ids, gates, experts)
    # Each rank's sum is rounded once, relative to sums of at most K terms.
    terms = moe_sum(
        np.abs(exact), ids, gates, [lambda r, w=w: r * abs(w) for w in weights]
    )
    atol = (DTYPES[dtype] + 16 * 2.0**-23) * terms + 1e-7
    what = f"{strategy} {dtype} {form} {case.name}"
    what += f" T={case.tokens} E={num_experts} D={width}"
    assert got.shape == expected.shape, what
    if not (np.abs(got - expected) <= atol).all():
        worst = float((np.abs(got - expected) / atol).max())
        raise AssertionError(f"{what}: {worst} times the tolerance")
    return what


def fuzz(group, seed, first, count, deadline, hang_at=None):
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    start = time.monotonic()
    for index in range(first, first + count):
        # All stacks, then the end of this rank, which ends the others.
        faulthandler.dump_traceback_later(deadline, exit=True)
        if index == hang_at and comm.rank == 0:
            time.sleep(10 * deadline)  # the others wait for it in their exchange
        try:
            exchange(comm, [seed, comm.size, index])
        except BaseException:
            print(f"exchange {index} of seed {seed}", file=sys.stderr)
            raise
    faulthandler.cancel_dump_traceback_later()
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exchanges", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="start at this exchange")
    parser.add_argument("--ranks", default="2,3,4", help="numbers of ranks")
    parser.add_argument("--transport", default="mpi", choices=["mpi", "ring"])
    parser.add_argument("--deadline", type=float, default=60.0, help="s per exchange")
    parser.add_argument("--hang-at", type=int, help="rank 0 hangs there: try it out")
    args = parser.parse_args()
    numbers = [int(number) for number in args.ranks.split(",")]
    # Half of them on 2 ranks, which are an order quicker on a 2-core host.
    shares = [2 if number <= 2 else 1 for number in numbers]
    total = 0
    for number, share in zip(numbers, shares, strict=True):
        count = -(-args.exchanges * share // sum(shares))
        print(f"{count} exchanges on {number} ranks, seed {args.seed}", flush=True)
        seconds = run_ranks(
            number,
            fuzz,
            args.seed,
            args.first,
            count,
            args.deadline,
            args.hang_at,
            transport=args.transport,
            timeout=60 + count * max(1.0, args.deadline / 60),
        )
        print(f"  {max(seconds) / count * 1e3:.1f} ms each", flush=True)
        total += count
    print(f"{total} exchanges over {args.transport}: no mismatch, no hang")
    return 0


if __name__ == "__main__":
    # By its module name, so that its functions can be sent to the ranks.
    from tests.support.fuzz_exchange import main as run

    sys.exit(run())
