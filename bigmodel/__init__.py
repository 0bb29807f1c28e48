"""bigmodel: plan, train, account for and shrink big models under a compute budget.

Importing the package imports nothing heavy and changes nothing; import the module you need: `from bigmodel
import train`. The order to read the code in is the order of the layout in README.md.
"""

__version__ = "0.1.0"
