"""The inputs of the tiny run: a random base, rows, a scorer and a recipe."""

from pathlib import Path

from conftest import preference_rows, recipe_of, train_tokenizer, write_jsonl


def make(folder: Path) -> None:
    """Writes them into the folder."""
    import tomli_w
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = write_jsonl(folder / "rows.jsonl", [*preference_rows(8), {"prompt": "no answer"}])
    held_out = write_jsonl(folder / "eval.jsonl", preference_rows(4, seed=1))
    (folder / "scorer.py").write_text(
        "def score(prompt, completion):\n    return float(len(completion))\n"
    )
    recipe = recipe_of(folder / "base", (rows, held_out))
    recipe["data"]["max_reject_fraction"] = 0.5
    recipe["align"] |= {"batch_pairs": 4, "max_steps": 4, "eval_every": 4, "loss": {"name": "dpo"}}
    recipe["sample"] = {"max_new_tokens": 4, "max_prompts": 2}
    recipe["eval"] = {"diversity_prompts": 0}
    recipe["judge"] = {"scorer": f"python:{folder}/scorer.py:score"}
    recipe["push"] = {"base_model": "org/base", "license": "mit"}
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
