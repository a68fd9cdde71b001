"""Models in torch alone that imitate what makes models of libraries difficult; the zoo's short form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entries import Case, Entry, classifier


class Output(dict[str, Any]):
    """A dict whose entries are attributes as well, such as ModelOutput of transformers."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class ConvNet(nn.Module):
    """Convolutions, batch norm, a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.block(x)).mean((2, 3)))


class AuxiliaryNet(nn.Module):
    """A second classifier that runs in training only, from another line of forward (Inception, FCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head, self.aux = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            x = self.features(x)
            return self.head(self.more(x).mean((2, 3))), self.aux(x.mean((2, 3)))
        return self.head(self.more(self.features(x)).mean((2, 3)))


class TextClassifier(nn.Module):
    """Takes the labels among its arguments and returns the loss with the scores (transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(50, 16), nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 3)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Output:
        x = self.embedding(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = None if attention_mask is None else attention_mask == 0
        logits = self.classifier(self.encoder(x, src_key_padding_mask=mask)[:, 0])
        if labels is None:
            return Output(logits=logits)
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round and its own forward (GPT-2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Decoder(nn.Module):
    """A decoder whose linear layers are its own, with a causal mask and tied weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Conv1D(width, 3 * width), Conv1D(width, width)
        self.up, self.down = Conv1D(width, 4 * width), Conv1D(4 * width, width)
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        x = self.embedding(input_ids)
        query, key, value = (
            part.view(*part.shape[:2], 2, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        logits = self.head(x)
        if labels is None:
            return Output(logits=logits)
        return Output(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits)


class Detector(nn.Module):
    """Takes a list of images and a list of targets; returns losses in training, boxes in eval (torchvision)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.scores, self.boxes = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        x = self.backbone(torch.stack([F.interpolate(image[None], (32, 32))[0] for image in images]))
        scores, boxes = self.scores(x).flatten(2).transpose(1, 2), self.boxes(x).flatten(2).transpose(1, 2)
        if self.training:
            if targets is None:
                raise ValueError("targets should not be none when in training mode")
            wanted = torch.stack([target["labels"][:1] for target in targets]).expand(-1, scores.shape[1])
            corners = torch.stack([target["boxes"][:1] for target in targets])
            return {
                "scores": F.cross_entropy(scores.flatten(0, 1), wanted.flatten()),
                "boxes": F.smooth_l1_loss(boxes, corners.expand_as(boxes)),
            }
        return [{"boxes": box, "scores": score.softmax(-1)} for box, score in zip(boxes, scores, strict=True)]


class DictDetector(nn.Module):
    """Takes a tensor, or the whole batch as a dict and returns its loss and the loss's parts (ultralytics)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 8, 3, padding=1),
        )

    def forward(self, x: Any) -> Any:
        if isinstance(x, dict):
            found = self.forward(x["img"]).mean((2, 3))[x["batch_idx"].long()]
            parts = torch.stack([F.mse_loss(found[:, :4], x["bboxes"]), F.cross_entropy(found[:, 4:], x["cls"].long())])
            return parts * len(x["img"]), parts.detach()
        return self.model(x)


class Recommender(nn.Module):
    """Bags of indices, the bags' beginnings, and dense features (DLRM)."""

    def __init__(self, tables: int = 2, width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(40, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        parts = [x] + [bag(index, offset) for bag, index, offset in zip(self.bags, indices, offsets, strict=True)]
        together = torch.stack(parts, 1)
        products = torch.bmm(together, together.transpose(1, 2))
        rows, columns = torch.tril_indices(len(parts), len(parts), -1)
        return self.top(torch.cat([x, products[:, rows, columns]], 1)).squeeze(1)


def _text() -> Case:
    tokens = torch.randint(1, 50, (2, 8))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    return Case(TextClassifier(), [batch, batch], lambda model, batch: model(**batch).loss)


def _decoder() -> Case:
    tokens = torch.randint(1, 50, (2, 8))
    return Case(Decoder(), [{"input_ids": tokens, "labels": tokens}] * 2, lambda model, batch: model(**batch).loss)


def _detector() -> Case:
    def batch() -> Any:
        targets = [{"boxes": torch.rand(2, 4), "labels": torch.randint(0, 3, (2,))} for _ in range(2)]
        return [torch.rand(3, 32, 32), torch.rand(3, 40, 36)], targets

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.stack(list(model(*batch).values())).sum()

    return Case(Detector(), [batch(), batch()], loss, forward_fn=_detect)


def _detect(model: nn.Module, batch: Any) -> Any:
    """Calls a detector as its users do, who never look at the mode."""
    return model(batch[0], batch[1]) if model.training else model(batch[0])


def _dict_detector() -> Case:
    def batch() -> dict[str, Any]:
        return {
            "img": torch.rand(2, 3, 32, 32),
            "batch_idx": torch.tensor([0.0, 1.0]),
            "cls": torch.tensor([1.0, 2.0]),
            "bboxes": torch.rand(2, 4),
            "im_file": ["a.jpg", "b.jpg"],
        }

    return Case(
        DictDetector(),
        [batch(), batch()],
        lambda model, batch: model(batch)[0].sum(),
        lambda model, batch: model(batch["img"]),
    )


def _recommender() -> Case:
    def batch() -> Any:
        offsets = torch.arange(0, 12, 3).expand(2, 4).contiguous()
        return (torch.rand(4, 5), torch.randint(0, 40, (2, 12)), offsets), torch.randint(0, 2, (4,)).float()

    def outputs(model: nn.Module, batch: Any) -> Any:
        return model(*batch[0])

    return Case(
        Recommender(),
        [batch(), batch()],
        lambda model, batch: F.binary_cross_entropy_with_logits(outputs(model, batch), batch[1]),
        outputs,
    )


def _segmentation() -> Case:
    """A network whose loader gives a dict that its forward does not know (MONAI)."""
    net = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.InstanceNorm3d(8),
        nn.PReLU(),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.PReLU(),
        nn.ConvTranspose3d(8, 2, 2, stride=2),
    )

    def batch() -> dict[str, Any]:
        return {"image": torch.rand(2, 1, 8, 8, 8), "label": torch.randint(0, 2, (2, 16, 16, 16))}

    def outputs(model: nn.Module, batch: Mapping[str, Any]) -> Any:
        return model(batch["image"])

    return Case(
        net, [batch(), batch()], lambda model, batch: F.cross_entropy(outputs(model, batch), batch["label"]), outputs
    )


def entries() -> Iterator[Entry]:
    """Yields the models of the short form."""
    yield Entry("ConvNet", "own", "image classifiers", lambda: classifier(ConvNet(), (3, 16, 16)))
    yield Entry("AuxiliaryNet", "own", "image classifiers", lambda: classifier(AuxiliaryNet(), (3, 16, 16)))
    yield Entry("TextClassifier", "own", "text encoders", _text)
    yield Entry("Decoder", "own", "text decoders", _decoder)
    yield Entry("Detector", "own", "detection", _detector)
    yield Entry("DictDetector", "own", "detection", _dict_detector)
    yield Entry("Recommender", "own", "recommenders", _recommender)
    yield Entry("DictSegmentation", "own", "medical and video", _segmentation)
