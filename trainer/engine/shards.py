"""fp32 weights and optimizer state of a ZeRO engine, by parameter: one view of stages 1, 2 and 3, at any world size.

ZeRO keeps them as flat partitions, each rank its part. A `Run` says which elements of which parameter lie where in this
rank's part: what is written by runs can be read back by an engine of another world size or ZeRO stage. (DeepSpeed's own
universal checkpoint knows Adam's two moments only, and gives all parameter groups the settings of the first.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.engine.engine import DeepSpeedEngine
from trainer.ranks.world import dist

WEIGHT = "weight"  # the fp32 master; the optimizer's own states are called as it calls them


@dataclass(frozen=True)
class Run:
    """Elements `start` to `start + numel` of a flattened parameter, at `offset` of this rank's partition `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


class Shards:
    """The trained parameters of an engine as this rank keeps them."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        """Reads the layout; copies nothing."""
        self.engine, self.zero, self.optimizer = engine, engine.optimizer, engine.optimizer.optimizer
        partitions_weights = engine.zero_optimization_partition_weights()
        self.flats: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if partitions_weights else self.zero.single_partition_of_fp32_groups
        )
        self.parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        locate = self._locate_in_stage_3 if partitions_weights else self._locate_in_stages_1_and_2
        self.runs = [run for name, p in self.parameters.items() if (run := locate(name, p)) is not None]

    @staticmethod
    def _locate_in_stages_1_and_2(name: str, parameter: nn.Parameter) -> Run | None:
        at = parameter._hp_mapping
        if at is None:  # all of it is other ranks'
            return None
        ours, theirs = at.lp_fragment_address, at.hp_fragment_address
        return Run(name, ours.start, ours.numel, at.param_group_index, theirs.start)

    def _locate_in_stage_3(self, name: str, parameter: nn.Parameter) -> Run | None:
        flat, offset, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = dist.get_rank() * numel
        numel = min(numel, parameter.ds_numel - start)  # the last ranks' parts are padded
        return Run(name, start, numel, flat, offset) if numel > 0 else None

    def states(self) -> Iterator[tuple[Run, str, Tensor]]:
        """(run, "weight" or the optimizer's name of a state, fp32 view [numel]) of all that this rank keeps."""
        for run in self.runs:
            for key, flat in self._states_of(run.flat).items():
                yield run, key, flat.narrow(0, run.offset, run.numel)

    def _states_of(self, flat: int) -> dict[str, Tensor]:
        weight = self.flats[flat]
        kept = {k: v for k, v in self.optimizer.state.get(weight, {}).items() if torch.is_tensor(v) and v.dim()}
        return {WEIGHT: weight.detach()} | kept

    def optimizer_step(self) -> int:
        """Updates that the optimizer has made."""
        made = {int(self.optimizer.state[flat]["step"]) for flat in self.flats if self.optimizer.state.get(flat)}
        assert len(made) <= 1, f"parameter groups were updated a different number of times: {made}"
        return made.pop() if made else 0

    @torch.no_grad()
    def restore(self, read: Callable[[Run, str], Tensor], keys: set[str], optimizer_step: int) -> None:
        """Fill weights and optimizer state, and refresh the working copies that forward uses; a collective.

        Args:
            read: gives the elements of a run of a state, fp32 [numel].
            keys: names of the states that there are, "weight" among them.
            optimizer_step: updates that were made.
        """
        for i, flat in enumerate(self.flats):
            # What no parameter covers is padding, which nothing reads.
            values = {key: torch.zeros_like(flat) for key in keys}
            for run in (run for run in self.runs if run.flat == i):
                for key, value in values.items():
                    value.narrow(0, run.offset, run.numel).copy_(read(run, key))
            flat.data.copy_(values.pop(WEIGHT))
            if values:
                self.optimizer.state[flat] = values | {"step": self._step(flat, optimizer_step)}
        if self.engine.zero_optimization_partition_weights():
            self._refresh_stage_3()
        else:
            self.zero.update_lp_params()

    def _step(self, flat: Tensor, value: int) -> Tensor | int:
        """The count as the optimizer itself would hold it."""
        if type(self.optimizer).__module__.startswith("deepspeed"):  # its Adam on the host counts in a plain int
            return value
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        return torch.tensor(float(value), dtype=torch.float32, device=flat.device if fused else "cpu")

    def _refresh_stage_3(self) -> None:
        zero = self.zero
        zero.checkpoint_event_prologue()
        for fp32, working, parts in zip(
            self.flats, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
        ):
            working.data.copy_(fp32.data)
            for part, value in zip(parts, zero.unflatten(working, parts), strict=True):
                part.data = value.data
        if zero.persistent_parameters:  # whole on every rank
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()

    def full(self, name: str, key: str = WEIGHT) -> Tensor:
        """A parameter's weights, or a state of it, whole: fp32, of the parameter's shape; a collective."""
        parameter = self.parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.engine.device)
        for run in (run for run in self.runs if run.name == name):
            whole.narrow(0, run.start, run.numel).copy_(self._states_of(run.flat)[key].narrow(0, run.offset, run.numel))
        dist.all_reduce(whole)
        return whole.view(shape)
