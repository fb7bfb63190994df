"""Scenes as records of the official forms: COCO captions, GQA questions and GQA scene graphs."""

from typing import Any, TypedDict

from latent_jax.data.scenes.captions import OPPOSITE
from latent_jax.data.scenes.questions import Draft
from latent_jax.data.scenes.render import box
from latent_jax.data.scenes.world import COLORS, IMAGE_SIZE, SHAPES, Scene

_SCOPES = (COLORS, SHAPES)
_RELATION_NAMES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


class _Step(TypedDict):
    """One step of a GQA program."""

    operation: str
    dependencies: list[int]
    argument: str


def coco_image(image_id: int, file_name: str) -> dict[str, int | str]:
    return {"license": 0, "file_name": file_name, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "id": image_id}


def coco_annotations(image_id: int, captions: list[str]) -> list[dict[str, int | str]]:
    return [
        {"image_id": image_id, "id": 10 * image_id + index, "caption": caption}
        for index, caption in enumerate(captions)
    ]


def gqa_questions(image_id: int, drafts: list[Draft]) -> dict[str, dict[str, Any]]:
    """Question id -> record. An id is its image's followed by two digits."""
    ids = [f"{image_id}{number:02}" for number in range(len(drafts))]
    return {
        question_id: _question(
            image_id,
            question_id,
            draft,
            [other for other, its in zip(ids, drafts, strict=True) if _entails(draft, its)],
        )
        for question_id, draft in zip(ids, drafts, strict=True)
    }


def gqa_choices(draft: Draft) -> dict[str, list[str]]:
    """Answers that fit the kind of question (`valid`), and those that this world can give to it (`plausible`)."""
    scope = next(
        (scope for scope in _SCOPES if draft.answer in scope and set(draft.choices) <= set(scope)), draft.choices
    )
    return {"valid": list(scope), "plausible": list(draft.choices)}


def gqa_scene_graph(image_id: int, scene: Scene) -> dict[str, Any]:
    """Objects with their boxes (pixels), attributes and relations to all others."""
    objects = {}
    for index, thing in enumerate(scene.things):
        x, y, width, height = box(scene, thing)
        relations = [
            {"name": _RELATION_NAMES[side], "object": _object_id(image_id, other_index)}
            for other_index, other in enumerate(scene.things)
            if other is not thing
            for side in OPPOSITE
            if scene.is_side(side, thing, other)
        ]
        attributes = [thing.size, thing.color] + [thing.material] * (thing.material != "plain")
        objects[_object_id(image_id, index)] = {
            "name": thing.shape,
            "x": x,
            "y": y,
            "w": width,
            "h": height,
            "attributes": attributes,
            "relations": relations,
        }
    return {"width": IMAGE_SIZE, "height": IMAGE_SIZE, "objects": objects}


def _object_id(image_id: int, index: int) -> str:
    return str(10 * image_id + index)


def _question(image_id: int, question_id: str, draft: Draft, entailed: list[str]) -> dict[str, Any]:
    program = _program(image_id, draft)
    return {
        "semantic": program,
        "entailed": entailed,
        "equivalent": [question_id],
        "question": draft.question,
        "imageId": str(image_id),
        "isBalanced": True,
        "groups": {"global": draft.group, "local": f"{draft.task}-{'_'.join(draft.question[:-1].lower().split())}"},
        "answer": draft.answer,
        "semanticStr": "->".join(map(_step_text, program)),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": draft.task, "semantic": draft.semantic, "structural": draft.structural},
        "fullAnswer": draft.full_answer,
    }


def _entails(draft: Draft, other: Draft) -> bool:
    """Whoever knows that the ball is red, or that the red object is a ball, knows that there is a red ball."""
    return draft.task in ("color", "shape") and other.task == "exist" and other.things == draft.things


def _program(image_id: int, draft: Draft) -> list[_Step]:
    """A chain of steps; each `select` starts anew and names its objects, a comparison takes all that were selected."""
    steps: list[_Step] = []
    selects: list[int] = []
    for index, (operation, argument) in enumerate(draft.program):
        dependencies = [index - 1] if index else []
        if operation == "select":
            things = draft.things if draft.task == "count" else draft.things[len(selects) : len(selects) + 1]
            argument = f"{argument} ({','.join(_object_id(image_id, thing) for thing in things) or '-'})"
            dependencies = []
            selects.append(index)
        elif operation.startswith("same"):
            dependencies = selects
        steps.append({"operation": operation, "dependencies": dependencies, "argument": argument})
    return steps


def _step_text(step: _Step) -> str:
    places = ",".join(map(str, step["dependencies"]))
    return f"{step['operation']}: {step['argument']}" + (f" [{places}]" if places else "")
