"""What `make kernels-aot` compiles: each kernel with each configuration of its static table."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compilation of one kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        label: what tells this case from the kernel's others, such as "bf16 128x64".
        signature: type of every runtime argument: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32".
        constants: value of every constexpr argument.
        num_warps, num_stages: launch options.
        tensor_cores: whether the code must hold tensor-core instructions.
        aligned: arguments whose value (or address) is a multiple of 16, as the launcher's usually are.
        archs: the cards that it is launched on.
        demands: card → pattern of an instruction that its PTX must hold.
        fp_fusion: whether the launcher lets a product and a sum become one instruction.
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = False
    aligned: tuple[str, ...] = field(default=())
    archs: tuple[str, ...] = ("sm_75", "sm_80", "sm_90")
    demands: dict[str, str] = field(default_factory=dict)
    fp_fusion: bool = True
