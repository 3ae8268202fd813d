"""What both networks share: images to tokens and back, conditioning, presets, strict loading.

B batch, C channels, H = W = sample_size, N tokens, D width
"""

import math
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fpdm.files import shipped
from fpdm.fixedpoint import Solution, Solve
from fpdm.models.layers import Block, FinalLayer, PatchEmbedder, TimestepEmbedder, unpatchify
from fpdm.models.presets import preset
from fpdm.models.recorded import Recorder

# Nothing in these networks is random, so there is no generator's state to keep. At module level: networks are copied.
RECOMPUTE = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Output:
    """What a network returns.

    sample    (B, C, H, W), or (B, 2C, H, W) with learned variance: the prediction, then the variance's channels
    solution  the fixed point, whose `value` (B, N, D) is what the next call may take as `init`; None for a DiT
    exits     iteration -> prediction from the iterate after it, for the iterations that `Solve.exits` names
    """

    sample: Tensor
    solution: Solution | None
    exits: dict[int, Tensor]


class Denoiser(ModelMixin, ConfigMixin):
    """The base of `DiT` and `FixedPointDiT`. A network holds weights and nothing else: no state between calls."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False  # diffusers sets this, and `_gradient_checkpointing_func`
    _repeated_blocks = ["MlpCore", "GatedCore", "Block"]
    _no_split_modules = ["MlpCore", "GatedCore", "Block"]  # their parts are called from outside forward, too
    config_name = "config.json"
    _recorder: Recorder | None = None

    def _build(self, sample_size: int, patch_size: int, in_channels: int, hidden_size: int, num_heads: int) -> None:
        """The layers at both ends. Called by the constructors once the configuration is registered."""
        check_sizes(sample_size, patch_size, in_channels, hidden_size, num_heads, self.config.num_classes)
        self.patch_embed = PatchEmbedder(sample_size, patch_size, in_channels, hidden_size)
        self.time_embed = TimestepEmbedder(hidden_size)
        self.label_embed = nn.Embedding(self.config.num_classes + 1, hidden_size)  # the last row is the null class
        self.final = FinalLayer(hidden_size, patch_size, self.out_channels)

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """A network of a named size, `"XL/2"` being size XL with patch 2; `settings` are the constructor's.

        Raises ValueError for an unknown name. Example: `from_preset("S/4", num_classes=10, sample_size=32)`.
        """
        size = preset(name)
        if "num_core" in cls._get_init_keys(cls):
            del size["depth"]
        return cls(**{**size, **settings})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained`, but missing, extra or misshaped weights raise ValueError: they only warn there,
        and the images are then noise. Knows the models inside the package, with `subfolder="transformer"`."""
        wants_info = kwargs.pop("output_loading_info", False)
        place = place_of(pretrained_model_name_or_path, kwargs.get("subfolder"))
        model, info = super().from_pretrained(place, output_loading_info=True, **kwargs)
        wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
        if wrong:
            listed = "; ".join(f"{kind.replace('_', ' ')}: {sorted(map(str, keys))}" for kind, keys in wrong.items())
            raise ValueError(f"the weights in {pretrained_model_name_or_path} do not fit its configuration: {listed}")
        return (model, info) if wants_info else model

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `load_config`, which knows the models inside the package, too."""
        place = place_of(pretrained_model_name_or_path, kwargs.get("subfolder"))
        return super().load_config(place, *args, **kwargs)

    @wraps(ModelMixin.save_pretrained, assigned=())  # a pipeline hands on what is in the signature
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' `save_pretrained`. Raises ValueError for a network in 8 bits."""
        self.check_savable()
        super().save_pretrained(*args, **kwargs)

    def check_savable(self) -> None:
        """Raises ValueError for a network in 8 bits."""
        if any(weight.dtype.itemsize == 1 for weight in self.state_dict().values()):
            raise ValueError("a network in 8 bits cannot be saved: save the one that it was made from, and convert it")

    def enable_group_offload(self, onload_device: torch.device, *args: Any, **kwargs: Any) -> None:
        """diffusers' `enable_group_offload`, by leaves. Raises ValueError for groups of blocks: a block's modulation is
        computed before the block is called, once for all iterations, and its weights would not be there."""
        bound = signature(ModelMixin.enable_group_offload).bind(self, onload_device, *args, **kwargs)
        bound.apply_defaults()
        kind = getattr(bound.arguments["offload_type"], "value", bound.arguments["offload_type"])
        if kind != "leaf_level":
            raise ValueError(f'offload_type is {kind!r}; these networks are offloaded by "leaf_level" only')
        super().enable_group_offload(*bound.args[1:], **bound.kwargs)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """From now on store of each block, in every iteration with gradient anew, the input only, and compute the rest
        again in backward: gradients stay the same, a step takes about a forward pass longer.

        Nothing changes where there is no gradient. `disable_gradient_checkpointing()` ends it.
        `gradient_checkpointing_func(function, *inputs)` takes the place of torch's `checkpoint`.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or RECOMPUTE)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks in place, each kind once: diffusers' method, and its arguments are torch.compile's.

        Without gradient one graph serves all sizes of batches, so nothing is compiled again when the batch, the plan or
        the iterations change. It is worth seconds at the first call, and is cached on disk for other processes.
        """
        for module in self._outermost(self._repeated_blocks):
            module.compile(*args, **kwargs)
            compiled: Any = module._compiled_call_impl
            module._compiled_call_impl = partial(call_for_any_batch, compiled)

    def enable_cuda_graphs(self) -> None:
        """From now on record calls under a fixed number of iterations, and play them again: the same results, with
        nothing between the kernels of a GPU to wait for. `disable_cuda_graphs()` ends it.

        Each size of batch is recorded once, for all timesteps and iterations, and has tensors of its own; the four used
        last are kept. Calls with a gradient, a tolerance or an accelerated solver are made as they were. Raises
        ValueError for a network that is not on a GPU.
        """
        if self.device.type != "cuda":
            raise ValueError(f"CUDA graphs are for networks on a GPU; this one is on {self.device}: move it before")
        self._recorder = Recorder()

    def disable_cuda_graphs(self) -> None:
        self._recorder = None

    def _outermost(self, kinds: list[str]) -> list[nn.Module]:
        """The modules of these kinds that are not inside another one of them."""
        found = {name: m for name, m in self.named_modules() if type(m).__name__ in kinds}
        return [m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)]

    @property
    def null_class(self) -> int:
        """The label that stands for no class: the last row of the table, whatever the number of classes."""
        return self.config.num_classes

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice `in_channels` with learned variance."""
        return self.config.in_channels * (2 if self.config.learned_variance else 1)

    @abstractmethod
    def passes(self, iterations: int | None = None) -> int:
        """Transformer block passes of one evaluation."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        y: Tensor | None = None,
        *,
        iterations: int | None = None,
        solve: Solve | None = None,
        init: Tensor | None = None,
    ) -> Output:
        """Predict from noisy images `x` (B, C, H, W) at timesteps `t` (B,) or one for all, of classes `y` (B,)."""

    def _embed(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D), the embedding of t (B, D) and of y (B, D)."""
        x, t, y = self._checked(x, t, y)
        dtype = self.patch_embed.proj.weight.dtype  # this one is kept by what casts or quantises the linear layers
        return self.patch_embed(x.to(dtype)), self.time_embed(t, dtype), self.label_embed(y)

    def _checked(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Images as they came, timesteps (B,) float32 and classes (B,). Raises ValueError for what does not fit."""
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network takes (batch, {', '.join(map(str, expected))})"
            )
        # A number is not copied to the device, which would be waited for.
        is_number = isinstance(t, int | float)
        t = x.new_full((len(x),), float(t), dtype=torch.float32) if is_number else torch.as_tensor(t, device=x.device)
        y = torch.full((len(x),), self.null_class, device=x.device) if y is None else y
        if t.shape not in ((), (len(x),)) or y.shape != (len(x),):
            raise ValueError(
                f"t has shape {tuple(t.shape)} and y {tuple(y.shape)}; a batch of {len(x)} takes ({len(x)},) of both, "
                "or one number for t"
            )
        return x, t.float().expand(len(x)), y

    def _run_blocks(self, blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
        """Apply blocks in turn to tokens `x` (B, N, D) under the conditioning `c` (B, D)."""
        run: Callable[..., Tensor] = run_block
        if self.gradient_checkpointing and torch.is_grad_enabled():
            run = partial(self._gradient_checkpointing_func, run_block)
        for block in blocks:
            x = run(block, x, c)
        return x

    def _unembed(self, tokens: Tensor, c: Tensor) -> Tensor:
        return unpatchify(self.final(tokens, c), self.config.patch_size)

    def _initialize(self) -> None:
        """DiT's initialisation: Xavier for linear maps, 0.02 for embeddings, zero for what closes a residual branch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        for weight in (self.label_embed.weight, self.time_embed.fc1.weight, self.time_embed.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.adaln.weight)
        nn.init.zeros_(self.final.linear.weight)


def place_of(name: str | os.PathLike, subfolder: str | None) -> str | os.PathLike:
    """What diffusers is to open: a model's folder inside the package, where none of the name is there."""
    there = os.path.exists(os.path.join(name, subfolder or ""))
    return name if there else shipped().get(str(name), name)


def run_block(block: Block, x: Tensor, c: Tensor) -> Tensor:
    """One block, its modulation included, so that checkpointing stores of that no more than `c`."""
    return block(x, block.modulation(c))


def call_for_any_batch(compiled: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """What `compiled` returns, for batches of any size: torch.compile would take 1 for a case apart, and a tensor that
    comes twice for another, as u does where a solve starts at what the injection adds."""
    from torch._dynamo.decorators import mark_unbacked  # which takes a second to import

    x = x.view_as(x) if torch.is_grad_enabled() else x.detach()  # another tensor of the same data
    if not torch.is_grad_enabled():
        for tensor in tree_leaves((x, *others)):
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                mark_unbacked(tensor, 0)
    return compiled(x, *others)


def condition(*embeddings: Tensor) -> Tensor:
    """The conditioning vector: the sum of embeddings, after the SiLU that every modulation begins with."""
    return F.silu(sum(embeddings[1:], embeddings[0]))


def check_sizes(sample: int, patch: int, channels: int, width: int, heads: int, classes: int) -> None:
    """Raises ValueError for sizes that no network can have, naming the nearest that one can."""
    for name, value, least in (
        ("sample_size", sample, 1), ("patch_size", patch, 1), ("in_channels", channels, 1),
        ("hidden_size", width, 1), ("num_heads", heads, 1), ("num_classes", classes, 0),
    ):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
    if sample % patch:
        fitting = [p for p in range(1, sample + 1) if sample % p == 0]
        raise ValueError(f"patch size {patch} does not divide the image size {sample}; sizes that do: {fitting}")
    step = math.lcm(4, heads)
    if width % step:
        raise ValueError(
            f"hidden_size is {width}; it must be a multiple of 4 and of num_heads ({heads}), "
            f"e.g. {-(-width // step) * step}"
        )
