"""What every command does around its training.

- `options`: the command line, and the settings that come out of it;
- `report`: progress bar, table and results.json;
- `checkpoints`: ``--checkpoint``;
- `processes`: ``--distributed``.
"""
