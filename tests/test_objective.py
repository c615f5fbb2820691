"""What is minimised: the cross-entropy in pieces, the load-balancing loss, noise on embeddings."""

from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn import functional as F
from trl import SFTTrainer

from finetune.adapters import attach, keeping_fp32
from finetune.base import load_base
from finetune.check import problems
from finetune.families import FAMILIES
from finetune.recipe import Adapter
from finetune.train.optimizer import loraplus
from finetune.train.settings import loss_type, trainer_settings
from tests.job import good
from tests.tiny_models import checkpoint, some_ids

BALANCED = [key for key, family in FAMILIES.items() if family.balances]


def trainer_of(family: str, folder: Any, *, loss: str = "", adapter: Adapter | None = None, **changes: Any) -> Any:
    """(trainer, ids) as the training stage makes it, on a tiny model in fp32."""
    base = load_base(checkpoint(family, True), load_in_4bit=False, precision="fp32")
    given = {"train__precision": "fp32", "train__report_to": [], "train__batch_size": 2}
    recipe = good(**(given | {"adapter": adapter or Adapter(targets="attention", rank=4)} | changes))
    torch.manual_seed(5)
    model = attach(base, recipe.adapter)
    ids = some_ids(base)
    args = trainer_settings(recipe, str(folder), "test", 2, 2, loss or loss_type(base.model), base.family)
    with keeping_fp32(model):
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels_of(ids).tolist()}),
            processing_class=base.tokenizer,
            optimizer_cls_and_kwargs=loraplus(recipe.train, args, recipe.adapter.lora_plus_ratio),
        )
    return trainer, ids


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """Labels of which a third is not trained."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 3] = -100
    return labels


def loss_of(trainer: Any, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one batch as the trainer computes it."""
    batch = {"input_ids": ids, "labels": labels_of(ids), "attention_mask": torch.ones_like(ids)}
    return trainer.compute_loss(trainer.model.train(), batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_plain_cross_entropy_and_nothing_else(family, tmp_path):
    """In pieces where TRL can, with no load-balancing loss unless asked: against torch on stock logits."""
    trainer, ids = trainer_of(family, tmp_path)
    auto = getattr(transformers, FAMILIES[family].auto_class)
    bare = auto.from_pretrained(checkpoint(family, True), dtype=torch.float32)
    with torch.no_grad():
        logits = bare.eval()(input_ids=ids).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1).double(), labels_of(ids)[:, 1:].flatten(), ignore_index=-100)
        found = loss_of(trainer, ids)
    assert found.item() == pytest.approx(expected.item(), abs=2e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_the_loss_in_pieces_has_the_gradients_of_the_whole(family, tmp_path):
    gradients = []
    for loss in ("chunked_nll", "nll"):
        trainer, ids = trainer_of(family, tmp_path, loss=loss)
        assert trainer.args.loss_type == loss
        loss_of(trainer, ids).backward()
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) == len(gradients[1]) >= 8
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", BALANCED)
def test_the_load_balancing_loss_is_added_when_asked_and_moves_the_adapter(family, tmp_path):
    """By Switch's formula on the router logits of the stock model: experts x share of rows x mean probability."""
    plain, ids = trainer_of(family, tmp_path)
    balanced, _ = trainer_of(family, tmp_path, train__router_aux_loss_coef=0.5)
    losses = [loss_of(trainer, ids) for trainer in (plain, balanced)]
    auto = getattr(transformers, FAMILIES[family].auto_class)
    bare = auto.from_pretrained(checkpoint(family, True), dtype=torch.float32).eval()
    with torch.no_grad():
        router_logits = bare(input_ids=ids, output_router_logits=True).router_logits
    layers = [layer.reshape(-1, layer.shape[-1]).double() for layer in router_logits]
    top_k = bare.config.get_text_config().num_experts_per_tok
    probability = torch.cat(layers).softmax(-1)
    chosen = F.one_hot(probability.topk(top_k).indices, probability.shape[1]).double().mean(0)  # (K, E)
    expected = probability.shape[1] * (chosen * probability.mean(0)).sum()
    assert expected > 0.5
    assert (losses[1] - losses[0]).item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    gradients = []
    for trainer, loss in zip((plain, balanced), losses, strict=True):
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_load_balancing_loss_that_would_not_be_added_is_refused(family):
    said = problems(
        good(model__family=family, model__config=dict(FAMILIES[family].tiny), data__max_length=64,
             adapter=Adapter(targets="attention"), train__router_aux_loss_coef=0.01)
    )  # fmt: skip
    assert [line[:7] for line in said] == ([] if family in BALANCED else ["TRN-008"])


def test_noise_is_added_while_training_of_the_size_that_was_asked_and_only_then(tmp_path):
    trainer, ids = trainer_of("mixtral", tmp_path, train__neftune_alpha=5.0, train__max_steps=2)
    model = trainer.model.get_base_model()
    plain: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: plain.append(output.detach()))
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    trainer.train()  # puts its hook behind the one above
    noise = seen[0] - plain[0]
    limit = 5.0 / (noise.shape[1] * noise.shape[2]) ** 0.5
    assert 0.95 * limit < noise.abs().max() <= limit * 1.0001
    assert noise.std() == pytest.approx(limit / 3**0.5, rel=0.05)
    trainer.model.train()(input_ids=ids)
    assert len(seen) == 3 and torch.equal(seen[2], plain[2])


def test_no_noise_unless_asked(tmp_path):
    trainer, _ = trainer_of("mixtral", tmp_path, train__max_steps=1)
    assert trainer.neftune_noise_alpha is None
