"""The Lightning module that trains an InstaNAS network in its three phases; see `dgnet.training._search`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from dgnet.data import IGNORED
from dgnet.errors import UsageError
from dgnet.evaluation import update_means
from dgnet.models import InstaNAS
from dgnet.training._config import TrainConfig
from dgnet.training._latency import LatencyTable
from dgnet.training._module import Classifier
from dgnet.training._schedule import build_schedule
from dgnet.training._search import LatencyRange, Phases, Window, bound_probabilities, policy_losses, reward_images
from dgnet.training._teacher import Teacher


class SearchClassifier(Classifier):
    """Trains the meta-graph in some epochs, as a classifier, and the controller in others, by policy gradient.

    The optimiser and the schedule are those of the meta-graph; the controller has Adam with a constant rate. `metrics.csv` has
    the number of the phase, the mean latency, and the mean reward, both of the modules that ran.
    """

    network: InstaNAS
    own_figures = ("latency_ms", "reward")

    def __init__(
        self,
        network: InstaNAS,
        config: TrainConfig,
        carried: dict[str, Any],
        latency: LatencyTable,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(network, config, carried, teacher=teacher)
        self.latency = latency
        self.phases = Phases.of(config)
        self.controller_optimizer: torch.optim.Adam
        self.stored_optimizer: dict[str, Any] | None = None  # of a resumed run, until the optimiser is built
        self._window: tuple[int, Window] | None = None  # with its epoch

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.is_global_zero:
            self.latency.write(self.network.latency)

    # What is trained.

    @property
    def trains_controller(self) -> bool:
        """Whether this epoch trains the controller."""
        return self.phases.trains_controller(self.current_epoch)

    def phase(self, epoch: int) -> int | None:
        return self.phases.number(epoch)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        super().on_train_batch_start(batch, batch_index)
        trains = self.trains_controller
        if self.network.controller.training != trains or self.network.bn1.training == trains:  # Lightning may have changed it
            self.network.train(not trains)
            self.network.controller.train(trains)

    def others(self) -> list[nn.Parameter]:
        """The parameters that are not trained in this epoch."""
        controller = {id(parameter) for parameter in self.network.controller.parameters()}
        return [p for p in self.network.parameters() if (id(p) in controller) != self.trains_controller]

    # Which modules run.

    def draw(self, images: Tensor) -> Tensor:
        """The modules that run in an epoch of the meta-graph, (B, L, M) bool."""
        phase = self.phases.number(self.current_epoch)
        if phase == 3:
            return self.network.choose(images)
        if phase == 1:
            keep = 1 - self.phases.drop(self.current_epoch, self.config.module_drop)
            return torch.rand(len(images), *self.network.latency.shape, device=images.device) < keep
        # Each image gets what the controller draws for another one, so that no module sees its own kind of images only.
        opened = self.sample(self.network.controller(images))
        return opened[torch.randperm(len(images), device=images.device)]

    def sample(self, logits: Tensor) -> Tensor:
        """Modules drawn as the search does, (B, L, M) bool."""
        return torch.rand_like(logits) < bound_probabilities(logits, self.config.exploration)

    def forward(self, images: Tensor, chosen: Tensor | None = None) -> Tensor:
        logits: Tensor = self.network(self.arrange(images), chosen)
        return logits

    def arrange(self, images: Tensor) -> Tensor:
        """`images` in the memory format of the run."""
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def observe(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            chosen = self.draw(self.arrange(images)) if self.training else self.network.choose(self.arrange(images))
        return self(images, chosen), {"latency_ms": self.network.estimate_latency(chosen)}

    # The reward, and the controller's step.

    @property
    def window(self) -> Window:
        """The latencies that are rewarded in this epoch."""
        epoch = self.current_epoch
        if self._window is None or self._window[0] != epoch:  # found once an epoch: it reads values from the device
            found = LatencyRange.of(self.network).window(self.phases.progress(epoch), self.config.latency_target)
            self._window = epoch, found
        return self._window[1]

    def judge(self, logits: Tensor, labels: Tensor, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**super().judge(logits, labels, figures), "reward": self.reward(logits, labels, figures["latency_ms"])}

    def reward(self, logits: Tensor, labels: Tensor, latency: Tensor) -> Tensor:
        """The reward of each image, (B,), without a gradient."""
        is_correct = logits.detach().argmax(1) == labels
        return reward_images(is_correct, latency, self.window, self.config.reward, self.config.reward_wrong)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Any]:
        step = self.controller_step if self.trains_controller else super().training_step
        result = step(batch, batch_index)
        if self.trainer.world_size > 1:  # DDP waits for a gradient of every parameter
            result["loss"] = result["loss"] + sum(0 * parameter.sum() for parameter in self.others())
        return result

    def controller_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Any]:
        """A step of policy gradient. The meta-graph is in evaluation mode and gets no gradient."""
        images, labels = self.arrange(batch[0]), batch[1]
        logits = self.network.controller(images)
        greedy, opened = logits.detach() >= 0, self.sample(logits.detach())
        with torch.no_grad():
            latency, answers = self.network.estimate_latency(greedy), self(images, greedy)
            drawn = self.reward(self(images, opened), labels, self.network.estimate_latency(opened))
            figures = self.judge(answers, labels, {"latency_ms": latency})
        counts = labels != IGNORED
        update_means(self.train_metrics, figures, counts)
        advantage = drawn - figures["reward"]
        losses = policy_losses(logits, opened, advantage, self.config.exploration, self.config.entropy)
        loss = losses.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)
        result = self.finish_step(loss, **{"top-1": (answers.argmax(1) == labels).sum()})
        self.lr = self.config.controller_lr
        return result

    # Optimisers. Lightning knows that of the meta-graph; in an epoch of the controller it finds no gradients.

    def parameter_groups(self) -> list[dict[str, Any]]:
        controller = {id(parameter) for parameter in self.network.controller.parameters()}
        groups = super().parameter_groups()
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in controller]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> Any:
        self.controller_optimizer = torch.optim.Adam(self.network.controller.parameters(), self.config.controller_lr)
        if self.stored_optimizer is not None:
            self.controller_optimizer.load_state_dict(self.stored_optimizer)
        return super().configure_optimizers()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.trains_controller and self.config.clip_mode == "norm" and gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.network.controller.parameters(), gradient_clip_val)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.trainer.world_size > 1:
            for parameter in self.others():
                parameter.grad = None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trains_controller:
            self.controller_optimizer.step()
            self.controller_optimizer.zero_grad()

    def build_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        return cast(Scheduler, PhasedSchedule(optimizer, self.config, steps))

    # What is printed, logged and stored.

    def describe_epoch(self) -> str:
        return f"{super().describe_epoch()} ({self.phases.name(self.current_epoch)})"

    def describe_figures(self, values: Mapping[str, float], is_evaluated: bool) -> str:
        line = super().describe_figures(values, is_evaluated)
        latency, reward = (values[f"{'val' if is_evaluated else 'train'}_{name}"] for name in self.own_figures)
        return f"{line}, modules {latency:.3g} of {LatencyRange.of(self.network).total:.3g} ms, reward {reward:.2f}"

    def _log_row(self, figures: dict[str, Any], **options: Any) -> None:
        super()._log_row({**figures, "phase": float(self.phases.number(self.current_epoch))}, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["controller_optimizer"] = self.controller_optimizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if not isinstance(checkpoint.get("controller_optimizer"), dict):
            raise UsageError("the checkpoint lacks the state of the controller's optimiser; replace it with another")
        self.stored_optimizer = checkpoint["controller_optimizer"]


class PhasedSchedule:
    """The learning rate of the meta-graph: `--sched` in phase 1, constant in the search, a cosine to 0 in fine-tuning.

    It has the methods of timm's schedules that training calls.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> None:
        self.optimizer, self.config, self.steps = optimizer, config, steps
        phases = Phases.of(config)
        self.starts = [round(steps * epoch / config.epochs) for epoch in (phases.first, phases.first + phases.search)]
        self.first = build_schedule(optimizer, config, self.starts[0], phases.first) if phases.first else None
        self.step_update(0)

    def step_update(self, num_updates: int) -> None:
        """Set the rates for the step after `num_updates` steps."""
        search, tune = self.starts
        if self.first is not None and num_updates < search:
            self.first.step_update(num_updates)
            return
        rate = self.config.peak_lr * self.config.search_lr
        if num_updates >= tune:
            done = min((num_updates - tune) / max(self.steps - tune, 1), 1.0)
            rate = self.config.peak_lr * self.config.tune_lr * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        return {"starts": self.starts, "first": None if self.first is None else self.first.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.first is not None:
            self.first.load_state_dict(state_dict["first"])
