"""Train the demo model: pretraining on the task language, then fine-tuning, in one run from one seed.

`python -P -m expertmesh.deploy.demo_model.train --out DIR --steps N`: the checkpoint folder and train_log.jsonl
(loss, expert balance, held-out accuracy) appear in DIR. `--state FILE` is written now and then and read if it exists,
so an interrupted run goes on where it was. float32 master weights, bf16 autocast, AdamW, linear decay to zero."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from .data import Batch, Batches, DataConfig
from .heldout import HeldOut
from .model import ModelConfig, TrainingModel, load_hf_state_dict

FOLDER = Path(__file__).parent / "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = 12000
    pretrain_share: float = 0.3
    learning_rate: float = 3e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    balance_coefficient: float = 0.01
    clip: float = 1.0
    seed: int = 0
    log_every: int = 50
    evaluate_every: int = 1000
    num_workers: int = 14
    stop_after_s: float = 1e9  # save and stop, for a resumed run

    def learning_rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * min(1.0, (self.steps - step) / (self.steps * 0.85))


class Trainer:
    def __init__(
        self, config: TrainConfig, data: DataConfig, model: ModelConfig, device: torch.device, log: Path
    ) -> None:
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        self.config, self.data, self.device, self.log = config, data, device, log
        self.batches = Batches(FOLDER, data, config.steps)
        self.held_out = HeldOut(FOLDER, data)
        self.model = TrainingModel(model, compiled=device.type == "cuda").to(device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step = 0

    def run(self, state: Path | None) -> None:
        config = self.config
        sampler = range(self.step, config.steps)
        workers: dict[str, Any] = {"num_workers": config.num_workers}
        if config.num_workers:
            workers |= {"prefetch_factor": 6, "pin_memory": self.device.type == "cuda"}
        loader = DataLoader(self.batches, batch_size=None, sampler=sampler, **workers)
        start, counted, mark = time.perf_counter(), 0, time.perf_counter()
        for batch in loader:
            figures = self.train_step(batch)
            self.step += 1
            counted += 1
            if self.step % config.log_every == 0 or self.step == 1:
                speed = counted * self.data.num_tokens / (time.perf_counter() - mark)
                counted, mark = 0, time.perf_counter()
                self.write(self._row(figures, speed, time.perf_counter() - start))
            if self.step % config.evaluate_every == 0 or self.step == config.steps:
                self.evaluate()
                if state is not None:
                    self.save_state(state)
            if time.perf_counter() - start > config.stop_after_s:
                break
        self.write(
            {"step": self.step, "seconds": round(time.perf_counter() - start, 1), "finished": self.step == config.steps}
        )

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        losses, hits, share, balance = self.forward(batch)
        targets = batch.targets.to(self.device, non_blocking=True) >= 0
        count = targets.sum()
        loss = losses.sum() / count
        (loss + self.config.balance_coefficient * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        accuracy = (hits & targets).sum() / count
        return {"loss": loss, "accuracy": accuracy, "balance": balance, "norm": norm, "share": share}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        tokens, targets, positions, cu_seqlens = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(tokens.long(), targets.long(), positions.long(), cu_seqlens, self.data.max_doc_tokens)

    def evaluate(self) -> None:
        """Share of held-out completions whose every token is the likeliest one: what greedy decoding gets right."""
        scores = self.held_out.score([self.forward(batch)[1].cpu() for batch in self.held_out.batches])
        self.write({"step": self.step, "held_out_exact": scores})

    def _row(self, figures: dict[str, torch.Tensor], speed: float, seconds: float) -> dict[str, Any]:
        share = figures["share"] / self.model.config.top_k * self.model.config.num_experts  # 1.0 everywhere is balanced
        return {
            "step": self.step,
            "phase": "pretrain" if self.step <= self.data.pretrain_steps else "fine-tune",
            **{name: round(float(figures[name]), 5) for name in ("loss", "accuracy", "balance", "norm")},
            "busiest": [round(float(x), 2) for x in share.max(-1).values],
            "idlest": [round(float(x), 2) for x in share.min(-1).values],
            "lr": round(self.config.learning_rate_at(self.step), 6),
            "tokens": self.step * self.data.num_tokens,
            "tokens_per_s": round(speed),
            "seconds": round(seconds, 1),
        }

    def write(self, row: dict[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)

    def save_state(self, path: Path) -> None:
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def load_state(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def save_checkpoint(model: TrainingModel, directory: Path) -> None:
    """The folder that transformers loads: weights and config beside the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "NOTICE"):
        if (FOLDER / name) != (directory / name):
            shutil.copyfile(FOLDER / name, directory / name)
    save_file(model.hf_state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    (directory / "config.json").write_text(json.dumps(config.hf_config(), indent=2) + "\n")
    generation = {
        "bos_token_id": config.pad_token_id,
        "do_sample": False,
        "eos_token_id": [config.eos_token_id, config.pad_token_id],
        "pad_token_id": config.pad_token_id,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--num-tokens", type=int, default=DataConfig().num_tokens)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--num-workers", type=int, default=defaults.num_workers)
    parser.add_argument("--evaluate-every", type=int, default=defaults.evaluate_every)
    parser.add_argument("--stop-after-s", type=float, default=defaults.stop_after_s)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain-share", type=float, default=defaults.pretrain_share)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--start-from", type=Path, help="checkpoint folder whose weights to start from")
    options = parser.parse_args()
    config = TrainConfig(
        steps=options.steps,
        learning_rate=options.learning_rate,
        num_workers=options.num_workers,
        evaluate_every=options.evaluate_every,
        pretrain_share=options.pretrain_share,
        stop_after_s=options.stop_after_s,
        warmup_steps=min(defaults.warmup_steps, options.steps // 10 + 1),
        seed=options.seed,
    )
    data = DataConfig(
        seed=options.seed, num_tokens=options.num_tokens, pretrain_steps=int(config.steps * config.pretrain_share)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, data, ModelConfig(), device, options.out / "train_log.jsonl")
    if options.start_from is not None:
        load_hf_state_dict(trainer.model, load_file(options.start_from / "model.safetensors"))
    if options.state is not None and options.state.exists():
        trainer.load_state(options.state)
    trainer.run(options.state)
    save_checkpoint(trainer.model, options.out / "checkpoint")


if __name__ == "__main__":
    main()
