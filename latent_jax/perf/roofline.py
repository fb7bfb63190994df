"""Bounds on a step's time from what the compiled program does and what the chips can do.

No forecast: matmuls at the data sheet's peak, memory and links at their full rate, rings without latency. The two
bounds are a step whose collectives all hide behind computation, and one where none does.
"""

import dataclasses

from latent_jax.models.qwen2_5_vl import flops
from latent_jax.perf import hlo
from latent_jax.perf.topologies import Chip, Topology

ASSUMPTIONS = (
    "matmuls at peak, memory and links at full rate, ring collectives without latency; "
    "kernels wait for the slower of matmuls and memory"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one device, by what takes them."""

    matmuls: float
    memory: float
    links: float
    network: float

    @property
    def hidden(self) -> float:
        """All collectives behind computation: the slowest part alone."""
        return max(self.matmuls, self.memory, self.links, self.network)

    @property
    def exposed(self) -> float:
        """No collective behind anything."""
        return max(self.matmuls, self.memory) + self.links + self.network


def peak(chip: Chip) -> float:
    """Dense bf16 FLOP/s of a device. Raises ValueError where its data sheet is not known."""
    most = flops.peak(chip.kind)
    if most is None:
        raise ValueError(f"{chip.kind}: no peak in models/qwen2_5_vl/flops.py")
    return most


def roofline(topology: Topology, program_flops: float, traffic: float, collectives: list[hlo.Collective]) -> Roofline:
    """Of one device: FLOPs and bytes of memory traffic a step, and its collectives (partition ids host by host)."""
    chip = topology.chip
    links = network = 0.0
    for each in collectives:
        hosts = len({at // topology.per_host for at in each.ids})
        links += each.sent
        if hosts > 1:
            # A ring through all devices enters every host once; its bytes are spread over the group's adapters there.
            once = each.sent * each.group / max(each.group - 1, 1)
            network += once * (hosts - 1) / hosts / (each.group / hosts)
    return Roofline(
        matmuls=program_flops / peak(chip),
        memory=traffic / chip.bandwidth,
        links=links / chip.link,
        network=network / chip.network if network else 0.0,
    )
