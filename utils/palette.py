"""Colour the classes in pictures: a palette that can be told apart by all, and the contest's own.

A palette is (256, 3) uint8 RGB by class id; white is for IGNORED, and a background is not drawn.

Any two of the first 11 colours of PALETTE, as many as the home competition has classes, are more than 20
apart (CIEDE2000: Sharma, Wu and Dalal, Color Research and Application 30, 2005), to the normal eye and to
protanopes, deuteranopes and tritanopes as Machado, Oliveira and Fernandes simulate them (IEEE TVCG 15, 2009).
A search over sRGB found them; each further colour is the farthest from all before it. Of 29 colours any two
are more than 7 apart, of 150 more than 3: there names tell more than colours. All are multiples of 8, or 255,
so that plotting.write_png may round them.
"""

import numpy as np

from metrics import IGNORED

COLOURS = (
    'a8a800e81870f8ff00ffc8ff0000f800ffc89880ff586000009890103828580058407060d0a080b00090ff70b0808010'
    'c0e0803040008060d000c0c0901040a0b0ff803060906040c0d000c080500000b0a070b090e0d0c0b0a02050c0208080'
    '708070d0ffb0205040e05090e0c0a0c080d0a0c060601080e0ff80ff90d0705030d01080b09080e0e0f03040ff2030c0'
    'a090a0707000a070509060fffff0e0a0900040402060104090c0e0b02050b0f05050501030605070003060a060703070'
    '1070b0a070d0607070b05060d0e0a0d0c0c0a0d080b090f0304050c0c0ffb0a050c0a0a0c09070b0a0b0b040a09020e0'
    '605070ffd0c0705060b08080b01030b0c0407010a0f0004060809070205070e060a0603040608030304060e0f0a08090'
    'f0b0b090405090a0906020609060709080a040301040b0c030a0b0e0f09030d0d0604040d070b0c06080405020b0a0e0'
    '8030b0a05090509030b0f0e0ff707030c08090b0908050ffe0a0b0c030d00000d060d09090ffff603080505090305060'
    'ff80c0c0ffc0ff30a07090c090a030e0c0e0305030c05080400090a080e020e0b0b07060a0404050205090d0c0a050b0'
    '6000e0a05030404040ffa0d040b070d0ff60f0e0e0d060a07060a000a040e0d0e070705090506060ff70a0b040e0b090'
    '907040409060a03070d090d0a0b0c0d0b000f0c0b080f0d0b0fff080b0a0604080f090f060f0ff5010708020d0d0e000'
    'f0f0f09000001070e0ffc060d000a0e04000506020ffe070a060c0b0f0b0e0f0d0a070f0fff040802030c0b070c03050'
    '007090602070d0d0908020601050e08080c0d07040d0f0a02040304090a07060c070b06080a0ff50708000f0c0502090'
    'a0707000d000d060c0c0909050a050b090e0708050f070f02020b0b07020009010a0d0e0c0c0702020ffb030f05000a0'
    'e010906080e0d0d0d09010a0500080b01000c0d0f0e0f0ffb0c080e0d070b0c0f0007050ffb050a050608020507050c0'
    'b0c0a0c0ffe0e0e090e050b08070708040b08010b0f060d080908070c0d0f070401040c07000d0e01000806020'
)
# the first is of class 0 where that is an object: the contest's background is black, and not drawn
CONTEST_COLOURS = (
    (240, 144, 0), (192, 0, 128), (0, 128, 192), (0, 128, 64), (128, 0, 0), (64, 0, 128),
    (64, 0, 192), (192, 128, 64), (192, 192, 128), (64, 64, 128), (128, 0, 192),
)  # fmt: skip

PALETTE = np.full((IGNORED + 1, 3), 255, np.uint8)
PALETTE[:IGNORED] = np.frombuffer(bytes.fromhex(COLOURS), np.uint8).reshape(IGNORED, 3)
CONTEST_PALETTE = PALETTE.copy()
CONTEST_PALETTE[: len(CONTEST_COLOURS)] = CONTEST_COLOURS
PALETTES = {'distinct': PALETTE, 'contest': CONTEST_PALETTE}  # by the names of options
