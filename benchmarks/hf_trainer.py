"""A peer of compare_training.py: Hugging Face's Trainer and GPT2LMHeadModel on our bins.

Prints the Trainer's own log line after each step.
"""

from dataclasses import dataclass

from nanosynth import settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(settings.Settings):
    """Train GPT2LMHeadModel with the Trainer until the process is ended."""

    data_dir: str = setting("", "prepared bins")
    out_dir: str = setting("", "a folder of its own; nothing is saved there")
    n_layer: int = setting(4, "blocks")
    n_head: int = setting(4, "attention heads")
    n_embd: int = setting(256, "channels")
    block_size: int = setting(256, "context, in tokens")
    rows_per_step: int = setting(16, "rows of a step")
    micro_batch_size: int = setting(16, "rows at once")
    device: str = setting("cpu", "cpu or cuda")
    dtype: str = setting("float32", "float32, or the Trainer's bf16 or fp16: bfloat16, float16")
    compile: bool = setting(False, "the Trainer's torch_compile")


def main(config: TrainerConfig) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from nanosynth import tokenizer
    from nanosynth.data import bins

    split = bins.Split(config.data_dir, "train")

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return split.n_rows(config.block_size)

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            ids = bins.read_batch(split, [row], config.block_size, "all").ids[0]
            return {"input_ids": ids, "labels": ids}  # the model shifts them itself

    shape = GPT2Config(
        vocab_size=tokenizer.VOCAB_SIZE,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    arguments = TrainingArguments(
        output_dir=config.out_dir,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.rows_per_step // config.micro_batch_size,
        max_steps=10**6,
        learning_rate=2e-4,
        weight_decay=0.01,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        torch_compile=config.compile,
        use_cpu=config.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(GPT2LMHeadModel(shape), arguments, train_dataset=Rows()).train()


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(TrainerConfig))
