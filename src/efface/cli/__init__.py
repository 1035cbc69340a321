"""The command line: `efface erase`, `sample`, `list`, `show`, `env`, `world`. It only parses, calls and prints."""
