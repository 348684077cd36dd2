"""Tasks of lm-eval that come with the package: a folder each, of task files (*.yaml) and the code that they call.

Any lm-eval runs them: `lm_eval --include_path "$(python -m cheaptrain.evaluate.task_folders)" --tasks NAME`. What is
asked is in docs/tasks.md.
"""
