"""Lightning: attach() in configure_optimizers, a callback for the logger: python examples/lightning_loop.py"""

import lightning
import tiny

import growkit
from growkit.integrations.lightning import Metrics


class Module(lightning.LightningModule):
    def __init__(self, automatic):
        super().__init__()
        self.model, self.automatic_optimization = tiny.new_model(), automatic

    def configure_optimizers(self):
        optimizer = growkit.SophiaG(growkit.param_groups(self.model, 0.1), **growkit.presets["short-run"])
        optimizer.attach(self.model, every=5)
        return optimizer

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()


def main(steps=30, automatic=True, logger=False):
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "log_every_n_steps": 10}
    trainer = lightning.Trainer(max_steps=steps, callbacks=[Metrics()], logger=logger, **options)
    trainer.fit(module := Module(automatic), tiny.batches(steps))
    print(f"Lightning: loss {tiny.loss_of(module.model):.4f}, {trainer.optimizers[0].metrics()}")
    return trainer


if __name__ == "__main__":
    main()
