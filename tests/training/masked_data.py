"""A datamodule that masks labels by their place in the global sample order, so that ranks differ strongly."""

from __future__ import annotations

from typing import Any

from data.datamodule import PackedDataModule


class MaskedDataModule(PackedDataModule):
    """Every second training sample keeps no label at all, the others keep a fifth of theirs.

    With one row a rank on two ranks, rank 1 never has a valid token.
    """

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.trainer is not None and self.trainer.training:
            rows, length = batch["labels"].shape
            for row in range(rows):
                odd = (int(batch["position"]) + row) % 2 == 1
                batch["labels"][row, 0 if odd else length // 5 :] = -100
        return batch
