"""Solver, steps and shift -> a scheduler with the official sigma table."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from wan.settings import Sampling


class Scheduler(Protocol):
    """What the loop needs: `timesteps` [N] for the model, int64 or float32, and `step` for the solver."""

    timesteps: Tensor
    sigmas: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool) -> Any: ...


def build_scheduler(sampling: Sampling, device: torch.device, train_timesteps: int = 1000) -> Scheduler:
    """A scheduler for one clip, at its first step.

    Sources of the tables: the official Wan2.2 FlowUniPC and FlowDPM++ schedulers. The model sees sigma * 1000
    truncated to an integer, the solver the exact float32 sigma; the library's own tables differ from both.

    "euler" is for step-distillation LoRAs and has the table that they were trained on: unrounded, from exactly 1
    (source: the authors' Wan2.2-Lightning and LightX2V; 4 steps at shift 5 are 1000, 937.5, 833.3, 625).
    """
    if sampling.solver == "euler":
        euler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_timesteps, shift=sampling.shift)
        # unshifted: the class applies its shift itself
        euler.set_timesteps(device=device, sigmas=np.linspace(1, 0, sampling.steps + 1)[:-1])
        euler.set_begin_index(0)
        return euler  # type: ignore[no-any-return]
    options: dict[str, Any] = {
        "num_train_timesteps": train_timesteps,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": sampling.shift,
    }
    scheduler: Any
    if sampling.solver == "unipc":
        scheduler = _UniPC(**options)
        first = float(np.float32(1 - 1 / train_timesteps))
        # unshifted: the class applies flow_shift itself
        scheduler.set_timesteps(sampling.steps, device=device, sigmas=np.linspace(first, 0, sampling.steps + 1)[:-1])
    else:
        scheduler = DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++", solver_order=2)
        scheduler.set_timesteps(sampling.steps, device=device)
        base = np.linspace(1, 0, sampling.steps + 1)[:-1]
        sigmas = sampling.shift * base / (1 + (sampling.shift - 1) * base)
        scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0)).to(torch.float32)
        scheduler.timesteps = torch.from_numpy(sigmas * train_timesteps).to(device=device, dtype=torch.int64)
    # two equal integer timesteps would otherwise make the class start at the second
    scheduler.set_begin_index(0)
    return scheduler  # type: ignore[no-any-return]


class _UniPC(UniPCMultistepScheduler):  # type: ignore[misc]
    """The library's UniPC of order 2, bh2, predicting data, with its coefficients in host memory.

    The library copies sigmas to the GPU and solves a 2x2 system there in every step, and waits for both. The arithmetic
    and its order are the same. Source of the formulas: UniPC, Zhao et al. 2023.
    """

    def multistep_uni_p_bh_update(self, model_output: Tensor, *, sample: Tensor, order: int) -> Tensor:
        """The predictor: from this step's sigma to the next."""
        return self._advance(sample, self.step_index, order)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """The newest: from the last step's sigma to this one's again, knowing the output there."""
        return self._advance(last_sample, self.step_index - 1, order, this_model_output)

    def _advance(self, sample: Tensor, start: int, order: int, newest: Tensor | None = None) -> Tensor:
        sigmas: Tensor = self.sigmas
        alphas = 1 - sigmas
        lambdas = alphas.log() - sigmas.log()
        h = lambdas[start] - lambdas[start + 1]  # negative
        b_h = torch.expm1(h)
        last: Tensor = self.model_outputs[-1]
        moved = sigmas[start + 1] / sigmas[start] * sample - alphas[start + 1] * b_h * last
        change: Tensor | float = 0.0
        weight = torch.tensor(0.5)
        if order == 2:
            ratio = (lambdas[start - 1] - lambdas[start]) / -h
            change = (self.model_outputs[-2] - last) / ratio
            phi = b_h / h - 1
            if newest is None:
                change = weight * change
            else:
                matrix = torch.stack([torch.ones(2), torch.stack([ratio, torch.ones(())])])
                earlier, weight = torch.linalg.solve(matrix, torch.stack([phi, (phi / h - 0.5) * 2]) / b_h)
                change = earlier * change
        if newest is not None:
            change = change + weight * (newest - last)
        return moved - alphas[start + 1] * b_h * change
