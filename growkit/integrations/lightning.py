"""Lightning's logger. The refresh itself needs nothing: call `optimizer.attach(...)` in `configure_optimizers`."""

from lightning.pytorch import Callback, LightningModule, Trainer


class Metrics(Callback):
    """Trainer(callbacks=[Metrics()]) logs the `metrics()` of every growkit optimizer, as "sophia/NAME"."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch) -> None:
        for i, optimizer in enumerate(trainer.optimizers):
            if hasattr(optimizer, "metrics"):
                prefix = "sophia/" if len(trainer.optimizers) == 1 else f"sophia{i}/"
                pl_module.log_dict({prefix + name: value for name, value in optimizer.metrics().items()})
