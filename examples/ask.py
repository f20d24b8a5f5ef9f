"""Ask the embedded model about an image: python examples/ask.py scan.png"""

import sys

import medmoe_edge

engine = medmoe_edge.load("nano")  # or a bundle's folder
image = sys.argv[1] if len(sys.argv) > 1 else "scan.png"

for answer in engine.ask_all(image, ["Is there effusion?", "Which organ is shown?"]):
    print(f"{answer.question} {answer.shown} ({answer.confidence:.0%})")
    for warning in answer.warnings:
        print(f"  {warning.message}")

print(f"The router reads the image as {answer.modality}; experts by share of tokens:")
for name, share in sorted(answer.experts.items(), key=lambda each: -each[1]):
    print(f"  {name:10} {share:.0%}")
print(answer.notice)
