"""Whether a checkpoint's chat template ends: it is a program, and may loop or grow without a limit.

The sandbox of transformers limits what a template can reach, not its time and memory. So it is rendered once in a
process of its own under limits of time, memory and output, before any other process renders it. That process has only
jinja2. Other faults (its syntax, an attribute that the sandbox refuses) are found when it is rendered for use.
"""

import functools
import json
import subprocess
import sys
from typing import Any

SECONDS, MEMORY, CHARACTERS = 5, 2**30, 2**20
WALL_SECONDS = 120  # only for a stalled machine: a template cannot wait, and its processor time is limited
_TOO_LONG, _TOO_LARGE = 7, 8  # exit statuses
_IMAGE = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
_TURNS = [{"role": "user", "content": _IMAGE}, {"role": "assistant", "content": "A ball."}]
CONVERSATIONS = (
    [{"role": "user", "content": "Hello."}],
    [{"role": "system", "content": "Be brief."}, *_TURNS, {"role": "user", "content": "Why?"}],
)


@functools.cache
def check_ends(template: str) -> None:
    """Raises UserError where rendering short conversations takes seconds, a GiB, or gives a million characters."""
    from latent_jax.errors import UserError  # not in the process of its own, which may not find the package

    try:
        # -P: this file's folder must not hide other modules.
        command = [sys.executable, "-P", __file__]
        asked = json.dumps([template, CONVERSATIONS])
        status = subprocess.run(
            command, input=asked.encode(), capture_output=True, timeout=WALL_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        status = _TOO_LONG
    except OSError:  # no process to be had: the template is taken as it is
        return
    if status == _TOO_LARGE:
        raise UserError(f"the chat template writes over {CHARACTERS:,} characters, or takes over 1 GiB")
    if status == _TOO_LONG or status < 0:
        raise UserError(f"the chat template does not end within {SECONDS} s of processor time")


def _render(template: str, conversations: list[Any]) -> int:
    """In the process of its own: the exit status."""
    import resource

    from jinja2 import ext, nodes, sandbox
    from jinja2 import parser as parsing

    class Generation(ext.Extension):
        """The tag by which some templates mark the text of the assistant."""

        tags = {"generation"}

        def parse(self, parser: parsing.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    compiled = environment.from_string(template)
    for messages in conversations:
        for prompt in (False, True):
            written = 0
            for piece in compiled.generate(messages=messages, add_generation_prompt=prompt):
                written += len(piece)
                if written > CHARACTERS:
                    return _TOO_LARGE
    return 0


if __name__ == "__main__":
    try:
        sys.exit(_render(*json.load(sys.stdin)))
    except MemoryError:
        sys.exit(_TOO_LARGE)
    except Exception:  # another fault: rendering it for use reports it
        sys.exit(1)
