"""A task that is asked in one form only: as a chat, or as plain text to go on from.

The same question in the other form is another task: a chat model asked in plain text has not been asked what it was
taught. lm-eval has one switch for all tasks of a command, so the trap is a score under the wrong one; here it is an
error. The file of the task says the form: `metadata.chat_template`.
"""

from typing import Any

from lm_eval.api.task import ConfigurableTask

from cheaptrain.errors import RecipeError


class OneForm(ConfigurableTask):
    """A task of lm-eval as its file describes it, that refuses the other form."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """The prompt. Raises RecipeError when it is asked for in the other form."""
        chat = self.config.metadata["chat_template"]
        if bool(kwargs.get("apply_chat_template")) != chat:
            asked, do = ("in the chat template", "turn it on") if chat else ("as plain text", "turn it off")
            raise RecipeError(
                f"{self.task_name} is asked {asked}: {do} (--apply_chat_template of lm_eval), and score tasks of the "
                "other form by themselves"
            )
        return super().fewshot_context(doc, num_fewshot, *args, **kwargs)
