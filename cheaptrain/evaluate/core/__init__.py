"""CORE, the mean centred accuracy of 22 tasks, as DCLM names it and nanochat defines it. docs/tasks.md says how."""
