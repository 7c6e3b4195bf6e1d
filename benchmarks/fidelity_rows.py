"""The rows of the fidelity study: what is compared, and which comes first where time is short."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from sixbit_jax.precision import EveryNth, PrecisionPolicy
from sixbit_jax.precision.types import Observation, Progress

if TYPE_CHECKING:
    from benchmarks.fidelity import Study

BITS = (5.0, 5.5, 6.0, 6.5, 7.0)
AT_EVERY_WIDTH = ("DMPQ", "static sites", "first and last steps")
"""Ways to spend bits that are compared at all of `BITS`; the others at 6."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
TAUS = (0.02, 0.6)
"""Between which the cache's threshold is looked for; a delta changes by 0.04 to 0.4 a step."""
FULL = (0.15, 6.0)
"""The whole method at 6 bits: share of skipped blocks, and mean bits with those counted as zero."""
LATE = 12
"""Steps at the end whose quantisation noise nothing repairs any more."""
PROMISE = (0.3, 5.0)
"""The whole method with 30 % of the blocks skipped; 5.6 bits if all others ran in INT8."""
REGULAR = {2: "2nd", 3: "3rd"}
"""Steps whose blocks are all skipped, whatever the activations do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A row to be run.

    Attributes:
        name, group: of the row.
        policy: unstacked, its leaves arrays.
        model: a key of `Study.models`.
        priority: rows of a smaller one run first.
        details: kept with the row.
    """

    name: str
    group: str
    policy: PrecisionPolicy
    model: str = "quantised"
    priority: int = 1
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def few_rows(study: "Study") -> list[Spec]:
    """Rows of `--tiny`: one program."""
    middle = float(np.median(study.fit.alpha * np.median(study.fit.trace.volatility) + study.fit.beta))
    return [
        Spec(name="W4A8", group="formats", policy=study.policy("int8")),
        Spec(name="DMPQ, 6 bits", group="routing", policy=study.policy(threshold=middle)),
        Spec(name="DMPQ + TDC, PDR (15 %, 6 bits)", group="stacking", policy=study.policy(threshold=middle, tau=1e9)),
    ]


def all_rows(study: "Study") -> list[Spec]:
    """The study of one solver."""
    return [*formats(study), *routing(study), *caching(study), *stepwise(study), *stacking(study)]


def formats(study: "Study") -> list[Spec]:
    """One format everywhere."""
    specs = []
    for route, name in (("16bit", "W4A16"), ("int8", "W4A8"), ("nvfp4", "W4A4")):
        policy = study.policy(route)
        more = {"group": "formats", "priority": 3}
        specs += [
            Spec(name=name, group="formats", policy=policy, priority=0 if route == "int8" else 1),
            Spec(
                name=f"{name}, four over six",
                policy=policy,
                model="4/6",
                **more | {"priority": 2 if route == "int8" else 3},
            ),
            Spec(name=f"{name}, no Hadamard", policy=study.fixed(route), model="no Hadamard", **more),
        ]
    return [*specs, Spec(name="W4A4, fp8 carrier", policy=study.fixed("nvfp4", carrier="fp8"), **more)]


def routing(study: "Study") -> list[Spec]:
    """Routers and tables without a cache, at equal mean bits."""

    def routed(**options: Any) -> Callable[[float], PrecisionPolicy]:
        return lambda bits: study.policy(threshold=study.threshold(bits, **options), **options)

    def static(table: Callable[..., np.ndarray], **options: Any) -> Callable[[float], PrecisionPolicy]:
        return lambda bits: study.policy(table(bits, **options))

    ways = {
        "DMPQ": (0, routed()),
        "DMPQ by stream error": (3, routed(by_stream=True)),
        f"DMPQ, INT8 in the last {LATE} steps": (1, routed(late=LATE)),
        "static sites": (1, static(study.allocation, by_step=False)),
        "first and last steps": (1, static(study.edge_table, first=0.5)),
        "first steps": (3, static(study.edge_table, first=1.0)),
        "last steps": (2, static(study.edge_table, first=0.0)),
        "static sites and steps": (2, static(study.allocation, by_step=True)),
    }
    return [
        Spec(name=f"{name}, {bits:g} bits", group="routing", policy=make(bits), priority=priority if bits == 6 else 4)
        for bits in BITS
        for name, (priority, make) in ways.items()
        if bits == 6 or name in AT_EVERY_WIDTH
    ]


def caching(study: "Study") -> list[Spec]:
    """The cache in the bf16 model."""
    specs = []
    for share in SHARES:
        tau = study.solve(lambda value: study.cached(tau=value), lambda spent: spent.skip_share, share, TAUS)
        specs.append(
            Spec(
                name=f"TDC, {100 * share:g} % skipped",
                group="caching",
                policy=study.cached(tau=tau),
                model="plain",
                priority=0 if share == 0.3 else 3,
                details={"tau": tau},
            )
        )
    for n, name in REGULAR.items():
        policy = study.cached(table=regular_skips(study, n))
        specs.append(Spec(name=f"every {name} step skipped", group="caching", policy=policy, model="plain", priority=1))
    return specs


def regular_skips(study: "Study", n: int) -> np.ndarray:
    """What `EveryNth` skips, bool [steps, blocks]."""
    steps, blocks = study.settings.steps, study.config.num_layers
    computed = Observation(
        computed=jnp.ones((blocks, 1), bool), volatility=jnp.ones((blocks, 1)), delta_change=jnp.ones((blocks, 1))
    )
    progress = [Progress(step=jnp.asarray(step), steps=steps) for step in range(steps)]
    return np.stack([EveryNth(n=n).decide(None, computed, at)[0][:, 0] for at in progress])


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PDR": (0, {}),
    "naive": (0, {"stale": True, "purify": False}),
    "INT8 after a skip": (2, {"purify": False}),
    "PDR, clean refresh in INT8": (3, {"clean": "int8"}),
    "PDR, clean refresh in 16 bit": (3, {"clean": "16bit"}),
    "PDR by stream error": (3, {"by_stream": True}),
    "PDR, clean refresh in 16 bit if a skip is in sight": (2, {"clean": "16bit", "in_sight": True}),
    "naive, INT8 in the last steps": (2, {"stale": True, "purify": False, "late": LATE}),
    "INT8 after a skip and in the last steps": (2, {"purify": False, "late": LATE}),
    "PDR, INT8 in the last steps": (1, {"late": LATE}),
    "PDR, INT8 in the last steps, four over six": (2, {"late": LATE, "model": "4/6"}),
    "PDR, one skip in a row": (5, {"max_skips": 1}),
    "PDR, four skips in a row": (5, {"max_skips": 4}),
    "PDR, warm-up of 10 steps": (5, {"warm_up": 10}),
    "PDR, cool-down of 6 steps": (5, {"cool_down": 6}),
    "PDR, outlier limit 15": (5, {"outlier_limit": 15.0}),
    "PDR, cache in int8": (3, {"cache_format": "int8"}),
    "PDR, cache in nvfp4": (3, {"cache_format": "nvfp4"}),
}
"""How quantisation and the cache are put together: the paper's way, less of it, and more; each with its priority."""
SAME_FORMAT = (
    ("16bit", "W4A16", "naive", "quantised"),
    ("int8", "W4A8", "naive", "quantised"),
    ("int8", "W4A8", "PDR", "quantised"),
    ("int8", "W4A8", "naive", "4/6"),
    ("nvfp4", "W4A4", "naive", "quantised"),
    ("nvfp4", "W4A4", "PDR", "quantised"),
)
"""One format under the cache: route, its name, with purified refresh or not, the model's weights."""


def stacking(study: "Study") -> list[Spec]:
    """Quantisation and the cache together: at the same skip share and mean bits, naive, purified, and improved."""
    specs = []
    for share, bits in (FULL, PROMISE):
        label = f"({100 * share:g} %, {bits:g} bits)"
        for name, (priority, options) in VARIANTS.items():
            options = {**options}
            model = options.pop("model", "quantised")
            found = study.tuned(share, bits, options)
            specs.append(
                Spec(
                    name=f"DMPQ + TDC, {name} {label}",
                    group="cache format" if "cache_format" in options else "stacking",
                    policy=study.policy(**found, **options),
                    model=model,
                    priority=priority,
                    details=found,
                )
            )
            if name == "PDR":
                tau = {"tau": found["tau"]}
                specs += [
                    Spec(
                        name=f"{format} + TDC, {how}{', four over six' if model == '4/6' else ''} {label}",
                        group="stacking",
                        policy=study.policy(route, **tau, purify=how == "PDR"),
                        model=model,
                        priority=5 if (share, bits) == FULL else 1 if how == "naive" and route == "int8" else 3,
                        details=tau,
                    )
                    for route, format, how, model in SAME_FORMAT
                ]
    return specs


def stepwise(study: "Study") -> list[Spec]:
    """Whole steps skipped at a fixed rhythm, under quantisation; and TDC in INT8 at its own threshold."""
    tau = study.solve(lambda value: study.policy("int8", tau=value), lambda spent: spent.skip_share, 0.3, TAUS)
    own = Spec(
        name="W4A8 + TDC, 30 % skipped",
        group="stacking",
        policy=study.policy("int8", tau=tau, purify=False),
        details={"tau": tau},
    )
    specs = [own]
    for n, name in REGULAR.items():
        table = regular_skips(study, n)

        def add(
            what: str,
            routes: str | None,
            table: np.ndarray = table,
            rhythm: str = name,
            model: str = "quantised",
            **more: Any,
        ) -> None:
            specs.append(
                Spec(
                    name=f"{what}, every {rhythm} step skipped",
                    group="cache format" if "cache_format" in more else "improvements",
                    policy=study.policy(routes, table=table, **more),
                    model=model,
                    priority=0 if routes == "int8" and model == "quantised" and "cache_format" not in more else 1,
                )
            )

        add("W4A8", "int8")
        for stored in ("int8", "nvfp4"):
            add(f"W4A8, cache in {stored}", "int8", cache_format=stored)
        add("W4A16", "16bit")
        add("W4A8, PDR", "int8", purify=True)
        add("W4A8, four over six", "int8", model="4/6")
        for late, label in ((0, "DMPQ"), (LATE, f"DMPQ, INT8 in the last {LATE} steps")):
            threshold = study.solve(
                lambda value, late=late, table=table: study.policy(threshold=value, table=table, late=late),
                lambda spent: spent.mean_bits,
                5.0,
                study.bounds(False),
            )
            add(f"{label}, 5 bits", None, threshold=threshold, late=late)
    return specs
