"""Shared settings of all plots. Needs matplotlib: pip install -e '.[plot]'."""

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def open_pyplot():
    """matplotlib.pyplot for output to files; the same data gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "llada_jax", "font.family": "sans-serif"}
    from matplotlib import pyplot

    return pyplot


def trim(axes) -> None:
    """Removes the top and right spines and adds a pale horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7ec")
    axes.set_axisbelow(True)


def save(figure, path: str, **options) -> None:
    """Writes a .svg or .png file and closes the figure. options: of matplotlib's savefig."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=160, metadata={"Date": None} if str(path).endswith(".svg") else None, **options)
    pyplot.close(figure)
