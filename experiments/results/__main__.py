"""Renders the tables of README.md and experiments/results/README.md from the recorded runs.

python -m experiments.results
"""

from experiments.results.render import write_pages

if __name__ == "__main__":
    write_pages()
