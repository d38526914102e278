from gemma._sample import draw as draw
from gemma._sample import settings as settings
