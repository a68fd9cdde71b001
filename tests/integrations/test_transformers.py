"""The callback for transformers' Trainer, against the plain loop."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("transformers")
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from compress_core import StateError, UsageError, create_compressed_model
from compress_core.integrations import read_compression_state
from compress_core.integrations.transformers import CompressionCallback, load_compressed
from compress_core.transforms.weight import raw_parameter
from tests.integrations.plain_loop import (
    CONFIG,
    DISTILLED,
    PENALTY,
    SPARSITY,
    Labelled,
    Network,
    assert_same_state,
    compressed,
    images,
    masks_and_scales,
    saved_state,
    sgd,
    train,
)


class Images(Dataset):
    def __init__(self):
        self.inputs, self.labels = images()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"images": self.inputs[index], "labels": self.labels[index]}


class InOrder(Trainer):
    """Reads the images in their order, as the plain loop does."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, self.args.per_device_train_batch_size))


def trainer(model, folder, optimizer=None, kind=InOrder, epochs=3, **options):
    """A Trainer of 6 optimizer steps in each epoch, each of two micro-batches."""
    passed = {name: options.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in options}
    defaults = {"save_strategy": "no", "logging_strategy": "no", "max_grad_norm": 0.0}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_train_epochs=epochs,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    constant = None if optimizer is None else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return kind(model=model, args=args, train_dataset=Images(), optimizers=(optimizer, constant), **passed)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_ends_with_the_bits_of_the_plain_loop(tmp_path, precision):
    controller, model = compressed(Labelled)
    CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model), bf16=precision is not None)).train()
    plain_controller, plain = compressed()
    train(plain_controller, plain, sgd(plain), 3, precision=precision)
    assert masks_and_scales(model)
    assert_same_state(model, plain)
    assert saved_state(controller) == saved_state(plain_controller)
    stripped, expected = controller.strip(), plain_controller.strip()
    assert torch.equal(stripped.eval()(images(8)[0])["logits"], expected.eval()(images(8)[0]))


def test_distillation_sees_every_micro_batch_and_ends_as_in_the_plain_loop(tmp_path, caplog):
    controller, model = compressed(Labelled, config=DISTILLED)
    CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model), epochs=1)).train()
    plain_controller, plain = compressed(config=DISTILLED)
    train(plain_controller, plain, sgd(plain), 1)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=2e-5)
    assert controller.statistics().knowledge_distillation.to_dict()["losses"].keys() == {
        "output 'logits'",
        "bn2 <- bn2 (attention)",
    }
    assert "parameter_groups" not in caplog.text


def test_an_optimizer_that_undoes_a_factor_on_gradients_is_warned_about(tmp_path, caplog):
    controller, model = compressed(Labelled, config=DISTILLED)
    CompressionCallback(controller).attach(trainer(model, tmp_path, epochs=1)).train()  # with AdamW
    assert caplog.text.count("AdamW takes nearly the same steps whatever the size of gradients") == 1


def own_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("loss", [None, own_loss], ids=["averaged", "summed"])
def test_the_loss_of_algorithms_counts_once_for_each_step(tmp_path, loss):
    controller, model = compressed(Labelled, config=PENALTY)
    CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model), compute_loss_func=loss)).train()
    plain_controller, plain = compressed(config=PENALTY)
    train(plain_controller, plain, sgd(plain), 3)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=2e-5)
    without_controller, without = compressed(config={**PENALTY, "compression": PENALTY["compression"][:1]})
    train(without_controller, without, sgd(without), 3)
    assert (without.fc.weight - plain.fc.weight).abs().max() > 1e-2  # the penalty is seen at all


def test_evaluation_reports_the_loss_of_the_model_alone(tmp_path):
    controller, model = compressed(Labelled, config=PENALTY)
    tested = CompressionCallback(controller).attach(trainer(model, tmp_path, eval_dataset=Images()))
    inputs, labels = images()
    expected = F.cross_entropy(model.eval()(inputs)["logits"], labels).item()
    assert tested.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_resumes_to_the_same_bits_in_the_middle_and_at_the_end_of_an_epoch(tmp_path):
    def run(folder, checkpoint=None, *, live=True):
        state = None if live else read_compression_state(checkpoint)
        controller, model = compressed(Labelled, state)
        options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
        tested = CompressionCallback(controller).attach(trainer(model, folder, kind=Trainer, **options))
        tested.train(resume_from_checkpoint=checkpoint)
        return controller, model

    controller, model = run(tmp_path / "whole")
    for step, live in ((4, True), (4, False), (6, True), (6, False), (10, False), (12, True)):
        again, resumed = run(tmp_path / f"{step} {live}", str(tmp_path / "whole" / f"checkpoint-{step}"), live=live)
        assert_same_state(model, resumed)
        assert saved_state(again) == saved_state(controller)
        assert again.scheduler.current_epoch == 2 and again.scheduler.current_step == 17


def test_resumes_from_the_last_checkpoint_of_the_folder(tmp_path):
    for epochs in (1, 3):
        controller, model = compressed(Labelled)
        options = {"save_strategy": "epoch", "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        tested = CompressionCallback(controller).attach(trainer(model, tmp_path, epochs=epochs, **options))
        tested.train(resume_from_checkpoint=epochs > 1)
    whole_controller, whole = compressed(Labelled)
    CompressionCallback(whole_controller).attach(trainer(whole, tmp_path / "whole", **options)).train()
    assert_same_state(model, whole)


def test_a_second_training_goes_on_with_the_epochs(tmp_path):
    controller, model = compressed(Labelled)
    tested = CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model), epochs=1))
    tested.train()
    tested.train()
    assert controller.scheduler.current_epoch == 1 and controller.scheduler.current_step == 11


def test_the_best_model_comes_with_its_masks_and_clock_and_a_warning(tmp_path, caplog):
    class Worse(InOrder):
        """Finds each evaluation worse than the one before."""

        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(self.state.global_step)}
            self.log(metrics)
            return metrics

    controller, model = compressed(Labelled)
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    tested = trainer(model, tmp_path, kind=Worse, eval_dataset=Images(), learning_rate=1e-2, **options)
    with caplog.at_level(logging.WARNING):
        CompressionCallback(controller).attach(tested).train()
    assert tested.state.best_model_checkpoint.endswith("checkpoint-6")
    assert controller.scheduler.current_epoch == 0
    assert controller.sparsity_level == pytest.approx(
        controller.statistics().magnitude_sparsity.to_dict()["requested_level"], abs=0.01
    )
    assert controller.sparsity_level < 0.6
    assert "checkpoint-6', the model is PARTIALLY_COMPRESSED (the controller is in epoch 0)" in caplog.text
    # The same as a model that is built from that checkpoint.
    _, loaded = load_compressed(Labelled(seed=1), CONFIG, tmp_path / "checkpoint-6")
    assert_same_state(model, loaded)


def test_statistics_are_logged_by_epoch(tmp_path):
    controller, model = compressed(Labelled)
    tested = CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model)))
    tested.train()
    name = "compression/magnitude_sparsity/sparsity_level"
    levels = [entry[name] for entry in tested.state.log_history if name in entry]
    assert len(levels) == 3 and levels == sorted(levels) and levels[-1] == pytest.approx(controller.sparsity_level)


def test_a_saved_model_is_loaded_with_masks_and_scales_and_nothing_is_left_out_in_silence(tmp_path):
    controller, model = compressed(Labelled)
    tested = CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model)))
    tested.train()
    tested.save_model(str(tmp_path / "final"))
    again, loaded = load_compressed(Labelled(seed=1), CONFIG, tmp_path / "final")
    assert_same_state(model, loaded)
    assert saved_state(again) == saved_state(controller)
    with pytest.raises(StateError, match="does not fit this model"):
        load_compressed(torch.nn.Sequential(torch.nn.Linear(3, 3)), CONFIG, tmp_path / "final")
    (tmp_path / "final" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(StateError, match="are damaged"):
        load_compressed(Labelled(seed=1), CONFIG, tmp_path / "final")


def test_tied_weights_are_saved_once_and_resumed(tmp_path):
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    texts = [{"input_ids": torch.randint(0, 40, (8,)), "labels": torch.randint(0, 40, (8,))} for _ in range(32)]
    section = {"input_info": [{"sample_size": [1, 8], "type": "long", "keyword": "input_ids"}]}
    section["compression"] = [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}, {"algorithm": "quantization"}]

    def run(folder, checkpoint=None):
        torch.manual_seed(0)
        controller, model = create_compressed_model(
            BertForMaskedLM(config), section, init_loader=[texts[0]["input_ids"][None]]
        )
        args = TrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            num_train_epochs=2,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        tested = CompressionCallback(controller).attach(Trainer(model=model, args=args, train_dataset=texts))
        tested.train(resume_from_checkpoint=checkpoint)
        return controller, model

    controller, model = run(tmp_path / "a")
    assert raw_parameter(model, "cls.predictions.decoder.weight") is raw_parameter(
        model, "bert.embeddings.word_embeddings.weight"
    )
    _, resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    assert_same_state(model, resumed)
    _, loaded = load_compressed(BertForMaskedLM(config), section, tmp_path / "a" / "checkpoint-8")
    assert_same_state(model, loaded)
    # Without transforms, the folder is one of transformers' own.
    controller.strip().save_pretrained(tmp_path / "plain")
    plain = BertForMaskedLM.from_pretrained(tmp_path / "plain")
    ids = torch.stack([text["input_ids"] for text in texts[:4]])
    weights = {n: p for n, p in plain.named_parameters() if p.ndim == 2}
    assert any((p == 0).float().mean() > 0.4 for p in weights.values())
    assert plain.eval()(ids).logits.isfinite().all()


def test_decay_leaves_scales_alone(tmp_path):
    _, model = compressed(Labelled)
    controller, model = compressed(Labelled)
    untouched = trainer(copy.deepcopy(model), tmp_path)
    assert any("_transforms." in name for name in untouched.get_decay_parameter_names(untouched.model))
    names = CompressionCallback(controller).attach(trainer(model, tmp_path)).get_decay_parameter_names(model)
    assert "conv1.weight" in names and not any("_transforms." in name for name in names)


def test_what_would_be_wrong_is_refused(tmp_path):
    controller, model = compressed(Labelled)
    with pytest.raises(UsageError, match="got a Labelled, not the controller"):
        CompressionCallback(model)
    with pytest.raises(UsageError, match="a Labelled that is not the controller's"):
        CompressionCallback(controller).attach(trainer(compressed(Labelled)[1], tmp_path))
    with pytest.raises(UsageError, match="auto_find_batch_size"):
        CompressionCallback(controller).attach(trainer(model, tmp_path, auto_find_batch_size=True))
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(UsageError, match="model_init"):
        CompressionCallback(controller).attach(Trainer(model_init=lambda: model, args=args))
    lonely = trainer(model, tmp_path, sgd(model))
    lonely.add_callback(CompressionCallback(controller))
    with pytest.raises(UsageError, match=r"callback\.attach"):
        lonely.train()
    callback = CompressionCallback(controller)
    callback.attach(trainer(model, tmp_path))
    with pytest.raises(UsageError, match="attached to a Trainer already"):
        callback.attach(trainer(model, tmp_path))


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path):
    plain = trainer(Labelled(), tmp_path / "plain", save_strategy="epoch", epochs=1)
    plain.train()
    sparse_controller, sparse = compressed(Labelled, config={**CONFIG, "compression": [SPARSITY]})
    other = trainer(sparse, tmp_path / "sparse", save_strategy="epoch", epochs=1)
    CompressionCallback(sparse_controller).attach(other).train()
    controller, model = compressed(Labelled)
    before = copy.deepcopy(model.state_dict())
    tested = CompressionCallback(controller).attach(trainer(model, tmp_path, sgd(model)))
    with pytest.raises(StateError, match="saved without the CompressionCallback"):
        tested.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-6"))
    with pytest.raises(StateError, match=r"is of the algorithms \['magnitude_sparsity'\]"):
        tested.train(resume_from_checkpoint=str(tmp_path / "sparse" / "checkpoint-6"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert isinstance(model, Network)
