def add_pages(stage):
    return ["formulas.md", {"Slips": "slips.md"}, {"By hand": "by_hand.md"}]
