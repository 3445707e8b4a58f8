"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""


class UserError(Exception):
    """Bad input from the person at the keyboard.

    The message is one sentence that names the file or field, the value found and the
    remedy. The command-line doors print it and exit with code 1, without a traceback.
    """
