"""Model, optimizer and step of one training worker."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from pipelines.artifacts import checkpoints
from pipelines.train import run_folder
from pipelines.train.answers import prepare_answers
from pipelines.train.config import TrainConfig
from stgt.interface.kinds import build
from stgt.model_folder import copy_weights, load_initial_weights, load_optimizer, load_weights
from stgt.precision import gradient_scaler, keep_frozen_weights_in
from stgt.training.optimizer import build_optimizer


class WorkerState:
    """Model, optimizer and step of one worker, from the latest checkpoint or initial weights."""

    def __init__(
        self, config: TrainConfig, device: torch.device, writes_encoder: bool = False
    ) -> None:
        """Load the weights.

        Args:
            config: Config of the run.
            device: Device of the model.
            writes_encoder: Whether this worker writes a frozen frame encoder into the run's folder,
                if the initial checkpoint trained it and so has no file of its own with it.
        """
        torch.manual_seed(config.seed)
        self.model = build(config.model)
        self.step = 0
        self.skipped = 0
        self.scaler = gradient_scaler(config.precision, device)
        resumed = run_folder.latest(config.output)
        start = config.init_from
        encoder = None if start is None else checkpoints.frame_encoder_of(start)
        keeps_encoder = encoder is None and start is not None and bool(self.model.frozen_names())
        self.frame_encoder = run_folder.encoder_uri(config.output) if keeps_encoder else encoder
        if resumed is not None:
            self.step = resumed
            start = run_folder.checkpoint_uri(config.output, resumed)
            state = checkpoints.read_state(start)
            self.skipped = state["skipped"]
            if state["scaler"]:
                self.scaler.load_state_dict(dict(state["scaler"]))
        with tempfile.TemporaryDirectory() as scratch:
            folder = None
            if start is not None and checkpoints.is_of_hub(start):
                copy_weights(checkpoints.load(start)[0], self.model, start)
            elif start is not None:
                folder, encoder_folder = checkpoints.fetch_with_encoder(
                    start, encoder if resumed is None else self.frame_encoder, Path(scratch)
                )
                load = load_initial_weights if resumed is None else load_weights
                load(self.model, folder, encoder_folder)
            if keeps_encoder and resumed is None and writes_encoder:
                checkpoints.save_frozen_encoder(run_folder.encoder_uri(config.output), self.model)
            prepare_answers(config, self.model)
            keep_frozen_weights_in(config.precision, self.model)
            self.model.to(device)
            self.optimizer = build_optimizer(self.model, config.optim)
            if folder is not None and resumed is not None:
                load_optimizer(self.optimizer, folder / checkpoints.OPTIMIZER)
        if config.compile:
            # Micro-batches accumulate gradients over several passes.
            self.model.compile_blocks(cuda_graphs=config.micro_batch is None)
