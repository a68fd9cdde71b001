"""The config section of knowledge distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress_core import AlgorithmConfig, Count, Scopes, Section


class FeaturePair(Section):
    """Layers of the compressed model that learn from layers of the teacher."""

    student: Scopes = Field(
        description="dotted names of layers of the compressed model; *, ? and [] stand for characters between two "
        "dots, {re} begins a regular expression"
    )
    teacher: Scopes | None = Field(
        None, description="the layers of the teacher, as many, in the same order; by default those of the same names"
    )
    type: Literal["mse", "cosine", "attention"] = Field(
        "mse",
        description="mean squared error; 1 - cosine of the channels at each position; or the squared distance of the "
        "normalized attention maps, which may have different numbers of channels (Zagoruyko & Komodakis 2017)",
    )
    scale: float = Field(1.0, gt=0, description="factor on the loss of each of these pairs")
    channel_dim: Count | None = Field(
        None,
        description="cosine and attention: dimension of the channels; by default 1, needed for 3-D tensors",
    )
    output: str | None = Field(
        None, description="path of the tensor in what the layers return, such as 0; needed if there are several"
    )


class WeightSchedule(Section):
    """How the weight of the whole loss changes from epoch to epoch."""

    type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="constant; or from initial to target, in a straight line or along half a cosine"
    )
    initial: float = Field(1.0, ge=0, description="factor on the loss until start_epoch")
    target: float = Field(0.0, ge=0, description="factor on the loss from end_epoch on")
    start_epoch: Count = Field(0, ge=0, description="last epoch with the initial factor")
    end_epoch: Count | None = Field(None, ge=1, description="first epoch with the target factor")


class KnowledgeDistillationConfig(AlgorithmConfig):
    """Section of the algorithm `knowledge_distillation`."""

    algorithm: Literal["knowledge_distillation"] = Field(description="name of the algorithm")
    type: Literal["mse", "softmax", "cosine"] | None = Field(
        None,
        description="loss between outputs: mean squared error, cross entropy of the softmax with a temperature, or "
        "1 - cosine along the classes; may be left out if there are features",
    )
    scale: float = Field(1.0, gt=0, description="factor on the loss between outputs")
    temperature: float = Field(1.0, gt=0, description="softmax: what logits are divided by")
    class_dim: Count | None = Field(
        None, description="softmax and cosine: dimension of the classes; by default 1, has to be given for 3-D tensors"
    )
    outputs: dict[str, str] = Field(
        default_factory=dict,
        description="path of an output of the compressed model -> path of the teacher's output that it learns from, "
        'such as {"logits": ""}; by default outputs with the same path belong together',
    )
    features: list[FeaturePair] = Field(
        default_factory=list, description="layers that learn from layers of the teacher"
    )
    weight_schedule: WeightSchedule = Field(
        default_factory=WeightSchedule, description="how the weight of the whole loss changes from epoch to epoch"
    )
