"""What runs the experts of a model and moves its rows, alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from mlx_ep.comm import Comm, Transport, gather_objects
from mlx_ep.exchange import Strategy
from mlx_ep.experts import install_runner
from mlx_ep.placement import Placement
from mlx_ep.rows import Job, Mover, Option
from mlx_ep.tune.agree import (
    agree,
    backend_variable,
    facts,
    forced_backend,
    warn_of_wrong,
)
from mlx_ep.tune.choose import Choice
from mlx_ep.tune.experts import ExpertsProblem, Layer
from mlx_ep.tune.explain import explain, explain_exchange
from mlx_ep.tune.movement import MovementProblem, MovementShape
from mlx_ep.tune.problem import Problem
from mlx_ep.tune.threads import BLAS, BlasThreads, choose_threads, share_cores
from mlx_ep.types import DispatchDtype


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        runner: a name in `RUNNERS` that has to be taken, or ``"auto"``.
        backend: ``"cpu"`` or ``"metal"``, or ``"auto"``; MLX_EP_BACKEND goes first.
        warmup: whether options are checked and timed; else the default rule holds.
    """

    runner: str = "auto"
    backend: str = "auto"
    warmup: bool = True


@dataclass(frozen=True)
class MovementPolicy:
    """What moves rows of one shape: a choice for each job."""

    shape: MovementShape
    jobs: Mapping[Job, Choice]

    def choose(self, job: Job, num_tokens: int) -> Option:
        """A `MovementChoice`."""
        return self.jobs[job].choose(num_tokens)


@dataclass(frozen=True)
class ModelPolicy:
    """What runs the experts of a model and moves its rows.

    Attributes:
        experts: what runs them, for each shape of the layers.
        movement: what packs and sums rows, for each shape of rows; the first one is
            the exchange's.
        mover: of the exchange, for `STRATEGIES.create`; None where none is sent.
        num_ranks: P.
        transport: what carries the rows.
        threads: of NumPy's BLAS in this rank.
        strategy: what exchanges rows, where somebody has said so: see `explain`.
    """

    experts: tuple[Choice, ...]
    movement: tuple[MovementPolicy, ...] = ()
    mover: Mover | None = None
    num_ranks: int = 1
    transport: Transport = "none"
    threads: BlasThreads = BlasThreads()  # noqa: RUF009, it is frozen
    strategy: Strategy | None = field(default=None, repr=False)

    def with_strategy(self, strategy: Strategy) -> ModelPolicy:
        """The same, with a strategy that `explain` tells about too."""
        return replace(self, strategy=strategy)

    def explain(self, num_tokens: Iterable[int] = (1, 16, 64, 256, 1024)) -> str:
        """Every option with its times; see `mlx_ep.tune.explain`."""
        counts = list(num_tokens)
        choices = [*self.experts, *(c for m in self.movement for c in m.jobs.values())]
        parts = [explain(choice, counts) for choice in choices]
        if self.strategy is not None and self.movement:
            parts.append(
                explain_exchange(
                    self.strategy,
                    self.movement[0].shape,
                    self.num_ranks,
                    self.transport,
                    counts,
                )
            )
        parts.append(str(self.threads))
        return "\n\n".join(part for part in parts if part)


# Shows a phase of so many steps while a body runs; it is told of each.
TimedLayers = Callable[[int], AbstractContextManager[Callable[[int], object]]]


def _unwatched(total: int) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda amount: None)


def tune(
    layers: Sequence[Layer],
    num_experts: int,
    comm: Comm,
    wish: Wish = Wish(),
    *,
    moves_rows: bool = False,
    dispatch_dtype: DispatchDtype = "model",
    placement: Placement | None = None,
    is_apart: bool = False,
    watch: TimedLayers = _unwatched,
) -> ModelPolicy:
    """Decide what runs the experts of every layer and moves its rows.

    Every rank must call it. Each rank checks and times the options on its own weights,
    unless the cache knows them. An option that is impossible or wrong on any rank is
    used by none; the times are those of rank 0. Two exchanges, of a few hundred bytes
    per shape, always. The layers' switches get their runners; the mover of the exchange
    is for the strategy that is made next. Ranks on one host share its cores: see
    `share_cores`.

    Args:
        layers: of the model, in one order on all ranks.
        num_experts: E.
        comm: the ranks.
        wish: what the user asks for.
        moves_rows: whether rows are exchanged, by something that takes a mover.
        dispatch_dtype: what rows travel in.
        placement: of the experts; default: contiguous.
        is_apart: whether each rank computes its own tokens with all experts, as one
            rank alone does: all choices of its rows are there, and no layer waits.
        watch: shows how many of the shapes are checked and timed.

    Raises:
        ValueError: on every rank: what the configuration forces is impossible.
    """
    placement = placement or Placement.of_model(num_experts, comm.size)
    exchanges = moves_rows and comm.size > 1
    firsts: dict[str, Layer] = {}
    for layer in layers:
        firsts.setdefault(str(layer.shape), layer)
    experts = {
        key: ExpertsProblem(
            layer, num_experts, 1 if is_apart else comm.size, wish.runner
        )
        for key, layer in firsts.items()
    }
    shapes = {
        key: MovementShape(
            width=int(layer.shape["width"]),
            dtype=layer.dtype,
            top_k=layer.top_k,
            placement=placement,
            rank=comm.rank,
            exchanges=exchanges,
            dispatch_dtype=dispatch_dtype,
        )
        for layer in firsts.values()
        if (key := layer.moved_as)
    }
    has_format = any(shape.format is not None for shape in shapes.values())
    jobs = {(key, job): shapes[key] for key in shapes for job in shapes[key].jobs}
    movement = {(key, job): MovementProblem(s, job) for (key, job), s in jobs.items()}
    problems: list[Problem] = [*experts.values(), *movement.values()]
    sharing = share_cores(comm)
    found = []
    with watch(len(problems)) as advance:
        for problem in problems:
            found.append(facts(problem, wish.warmup, sharing))
            advance(1)
    mine = {"backend": backend_variable(), "facts": found}
    ranks = gather_objects(comm, mine)
    backend = forced_backend([rank["backend"] for rank in ranks], wish.backend)
    choices = [
        agree(problem, [rank["facts"][index] for rank in ranks], backend)
        for index, problem in enumerate(problems)
    ]
    if comm.rank == 0:
        for choice in choices:
            warn_of_wrong(choice)
    by_shape = dict(zip(experts, choices[: len(experts)], strict=True))
    by_job = dict(zip(movement, choices[len(experts) :], strict=True))
    policies = {
        key: MovementPolicy(shape, {job: by_job[key, job] for job in shape.jobs})
        for key, shape in shapes.items()
    }
    movers = {key: Mover(policy.choose) for key, policy in policies.items()}
    for layer in layers:
        choice = by_shape[str(layer.shape)]
        install_runner(layer.switch, choice.choose, movers.get(layer.moved_as))
    blas = [p for p in experts.values() if p.is_held and p.is_worth_checking([BLAS])]
    right = [p for p in blas if BLAS in by_shape[str(p.layer.shape)].possible]
    return ModelPolicy(
        experts=tuple(by_shape.values()),
        movement=tuple(policies.values()),
        mover=next(iter(movers.values()), None) if exchanges or has_format else None,
        num_ranks=comm.size,
        transport=comm.transport,
        threads=choose_threads(next(iter(right), None), sharing, wish.warmup),
    )
