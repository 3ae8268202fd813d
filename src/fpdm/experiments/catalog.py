"""The tables of docs/reproduction.md, and what they can stand on.

Nothing here is computed: `fpdm experiment NAME --on GROUND` does what a table says.
"""

from typing import Any

from fpdm.experiments.points import Axes
from fpdm.experiments.table import Ground, Model, Table
from fpdm.names import unknown
from fpdm.recipes.forms import form

BUDGETS = (24, 40, 80, 160, 560)
FEW_BUDGETS = (24, 40, 80, 160)
ITERATIONS = (1, 2, 3, 6)  # per timestep; among them each model finds its own at each budget
FORMS = {"DDPM": "ddpm", "DDIM": "ddim", "DPM-Solver++": "dpm++", "UniPC": "unipc"}
BEST = Axes(FEW_BUDGETS, ("unipc",), ITERATIONS)  # by the main table the best scheduler
SIX: dict[str, Any] = {"no_grad_max": 6, "with_grad_max": 6}  # groups of K blocks make these divided by K
GATE: dict[str, Any] = {"injection": "gate", "input_skip": False}  # it has the skip by itself
PAPER: dict[str, Any] = {"time_in_pre_post": False, "input_skip": False, **SIX}  # it converges slower


def formed(title: str, blocks: str = "1+1+1", **changes: Any) -> Model:
    """A network of a form, with some fields changed."""
    return Model(title, {**form(blocks), **changes})


FULL, HALF, NEAREST = 8, 4, 3  # depths of the DiTs; the last one's parameters are nearest to FPDM's
MODELS = {
    "fpdm": formed("FPDM, 1+1+1"),
    "fpdm-paper": formed("FPDM as in the paper", **PAPER),
    "fpdm-k2": formed("FPDM, 1+2+1", "1+2+1"),
    "fpdm-k4": formed("FPDM, 1+4+1", "1+4+1"),
    **{f"looped{count}": formed(f"FPDM, 0+{count}+0, half warm", f"0+{count}+0")
       for count in (NEAREST, HALF, 6, FULL)},
    **{f"gated{count}": formed(f"FPDM, 0+{count}+0, half warm, gate", f"0+{count}+0", **GATE)
       for count in (NEAREST, HALF)},
    **{f"dit{depth}": Model(f"DiT, {depth} blocks", {"network": "dit", "depth": depth})
       for depth in (NEAREST, HALF, FULL)},
}  # fmt: skip

FEWER = {
    "fpdm-few": formed("FPDM, N = 1, M = 2", no_grad_max=1, with_grad_max=2),
    "fpdm-warm": formed("FPDM, N = 0, M = 1, half warm", no_grad_max=0, with_grad_max=1, warm_share=0.5),
}  # fewer iterations a step, and so more steps

METHODS = {
    "fpdm": formed("S-JFB, N = M = 3"),
    "jfb": formed("JFB, 6 and 1", gradient="jfb", no_grad_max=6),
    "multistep": formed("multi-step JFB, 3 and 3", gradient="multistep"),
    "phantom": formed("phantom, 3 and 3", gradient="phantom"),
    "implicit": formed("implicit, after 6", gradient="implicit", no_grad_max=6),
    "unroll": formed("unrolled, 6", gradient="unroll", with_grad_max=6),
    "exits": formed("S-JFB, exits on the target", exit_loss="target"),
    "distilled": formed("S-JFB, exits on the final prediction", exit_loss="final"),
    "warm": formed("S-JFB, half of the steps warm", warm_share=0.5),
    "exits-warm": formed("S-JFB, exits on the target, half warm", exit_loss="target", warm_share=0.5),
    "unroll-exits": formed("unrolled, 6, exits on the target", gradient="unroll", with_grad_max=6, exit_loss="target"),
    "m1": formed("S-JFB, N = 3, M = 1", with_grad_max=1),
    "m6": formed("S-JFB, N = 3, M = 6", with_grad_max=6),
    "m12": formed("S-JFB, N = 3, M = 12", with_grad_max=12),
    "n0-m6": formed("S-JFB, N = 0, M = 6", no_grad_max=0, with_grad_max=6),
    "n6-m6": formed("S-JFB, N = M = 6", **SIX),
}

FORM = {
    "fpdm-paper": formed("as in the paper", **PAPER),
    "time": formed("+ time in pre and post", **{**PAPER, "time_in_pre_post": True}),
    "skip": formed("+ skip", **{**PAPER, "input_skip": True}),
    "n6-m6": formed("+ both", **SIX),
}

DEPTHS = {
    "fpdm": formed("1 pre, 1 post"),
    **{f"pre{pre}-post{post}": formed(f"{pre} pre, {post} post", f"{pre}+1+{post}")
       for pre, post in ((2, 1), (1, 2), (2, 2), (4, 4))},
}  # fmt: skip


def counted(n: int) -> str:
    return "1 iteration" if n == 1 else f"{n} iterations"


SMOOTHED = (*ITERATIONS, 12)
SPENDING = {
    **{f"{counted(n)}, no reuse": Axes(FEW_BUDGETS, ("dpm++",), (n,), reuses=("none",)) for n in SMOOTHED},
    **{counted(n): Axes(FEW_BUDGETS, ("dpm++",), (n,)) for n in SMOOTHED},
    "linear forecast": Axes(FEW_BUDGETS, ("dpm++",), ITERATIONS, reuses=("linear",)),
    **{f"{name} allocation": Axes(FEW_BUDGETS, ("dpm++",), ITERATIONS, allocations=(f"linear:{slope}",))
       for name, slope in (("rising", 1), ("falling", -1))},
    "Anderson": Axes(FEW_BUDGETS, ("dpm++",), ITERATIONS, solvers=("anderson:2",)),
    "UniPC": Axes(FEW_BUDGETS, ("unipc",), ITERATIONS),
    "tuned": Axes(FEW_BUDGETS, ("dpm++", "unipc"), tuned=True),
}  # fmt: skip

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 24, 48)  # training makes 1 to 6, or 1 to 12
AT_20 = {counted(n): Axes((20 * (2 + n),), ("dpm++",), (n,)) for n in LENGTHS}  # 20 timesteps each

TABLES = {
    "main": Table(
        "At which budgets is which model best?",
        MODELS,
        {name: Axes(BUDGETS, (scheduler,), ITERATIONS) for name, scheduler in FORMS.items()},
    ),
    "operations": Table(
        "And if all were trained with equally many operations?",
        {**MODELS, **FEWER},
        {"best": BEST},
        equal="operations",
    ),
    "methods": Table("Which gradient, and what besides?", METHODS, {"best": BEST}),
    "form": Table("What do the two changes to the paper's network gain?", FORM, {"best": BEST}),
    "iterations": Table(
        "What if 20 timesteps are made with more or fewer iterations than in training?",
        {label: MODELS[label] for label in ("fpdm", "fpdm-paper")},
        AT_20,
    ),
    "depths": Table("How many explicit blocks?", DEPTHS, {"best": BEST}),
    "spending": Table("What does each way to spend a budget gain?", {"fpdm": MODELS["fpdm"]}, SPENDING),
}

GROUNDS = {
    "digits": Ground("digits"),
    "fashion-mnist": Ground(
        "fashion_mnist", {"steps": 5000}, data="the folder of the four IDX files", split="test", seeds=(0,)
    ),
    "cifar10": Ground("cifar10", {"steps": 20_000}, data="an image folder, one folder per class"),
}


def table(name: str) -> Table:
    """Raises ValueError for a name that no table has."""
    if name not in TABLES:
        raise ValueError(unknown("table", name, TABLES))
    return TABLES[name]


def ground(name: str) -> Ground:
    """Raises ValueError for a name that no ground has."""
    if name not in GROUNDS:
        raise ValueError(unknown("ground", name, GROUNDS))
    return GROUNDS[name]
