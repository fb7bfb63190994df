"""The command that answers one prompt.

    python -m latent_jax.generate --model=DIR [--image=FILE ...] [--imagine=TEXT] --prompt=TEXT \\
            [--max_new_tokens=N] [--temperature=T] [--top_p=P] [--seed=N]
"""

from latent_jax.runtime.command import Parser, command
from latent_jax.runtime.devices import enable_compile_cache


@command
def main() -> None:
    """The command. Only the answer goes to standard output."""
    parser = Parser(prog="python -m latent_jax.generate", description="Answers one prompt.")
    parser.add_argument("--model", required=True, help="HF checkpoint directory, hub id or workdir; '' = the tiny one")
    parser.add_argument("--image", action="append", default=[], help="image file; may be given several times")
    parser.add_argument("--imagine", action="append", default=[], help="description of an image to imagine")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 = greedy, the default")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling: the same one gives the same answer")
    parser.add_argument("--dtype", default=None, help="float32 or bfloat16; default: the checkpoint's")
    arguments = parser.parse_args()
    import latent_jax

    enable_compile_cache()
    vlm = latent_jax.load(arguments.model, dtype=arguments.dtype)
    content = [{"type": "image", "image": file} for file in arguments.image]
    content += [{"type": "imagine", "text": text} for text in arguments.imagine]
    content += [{"type": "text", "text": arguments.prompt}]
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    print(vlm.generate([[{"role": "user", "content": content}]], **options)[0])


if __name__ == "__main__":
    main()
