"""A cycle model of the TPU v5e: the time of a program that nobody ran.

The TPU's compiler runs on any machine.  Asked to, it prints the final program
bundle by bundle, and a bundle is a cycle: what is left to model is how long
copies and units keep the program waiting.

    estimate(function, specs, values) -> Estimate

is the door.  It wants a process whose compiler was told to print, one for each
program: `environment` makes the variables to start it with.  To read it:

    chip          what the chip can do, in cycles and bytes
    estimator     the door: compile, read, execute, add up
    compiler      compiles for chips that are described, not attached
    listing       reads the bundles that it prints
    hlo           reads the program that they are parts of
    overlays      reads how it is cut to fit the instruction memory
    machine       executes a listing and counts, by means of
      scalar        registers, predicates and addresses
      units         the queues of matrix and transpose units
      copies        copies under way, and waits for them
      loading       overlays that are loaded before they run
      stretches     bundles without branches, looked at once
    operands      values of integer operands, on which kernels branch
    ragged        those of XLA's own ragged products
    collectives   communication with other chips, and what covers it
    links         how long that takes
    module        the sum over a whole program
    program_code  what of it is the loading of code

The rest of the package is what tools and tests look into it with.  It knows
nothing of this project's kernels, and imports nothing of `bench` around it.
"""

from .chip import V5E as V5E
from .chip import Chip as Chip
from .compiler import AXIS as AXIS
from .compiler import ONE_CHIP as ONE_CHIP
from .compiler import Placement as Placement
from .compiler import compile_program as compile_program
from .compiler import compiler_log as compiler_log
from .compiler import describe as describe
from .compiler import environment as environment
from .compiler import recorded as recorded
from .copies import Copies as Copies
from .estimator import Estimate as Estimate
from .estimator import StaticModel as StaticModel
from .estimator import estimate as estimate
from .estimator import static_model as static_model
from .listing import Instruction as Instruction
from .listing import Listing as Listing
from .listing import ListingError as ListingError
from .listing import find_listings as find_listings
from .listing import parse_listing as parse_listing
from .machine import Cycles as Cycles
from .machine import Undecidable as Undecidable
from .machine import count_cycles as count_cycles
from .module import estimate_module as estimate_module
from .operands import kernel_operands as kernel_operands
from .overlays import Loop as Loop
from .overlays import Overlays as Overlays
from .overlays import parse_log as parse_log
from .program_code import Code as Code
from .program_code import CodeLoop as CodeLoop
from .units import Units as Units
