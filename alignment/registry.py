"""One way to swap anything: a component is a frozen dataclass, registered by name under its kind.

Its fields are its options, its methods are the algorithm. In a recipe ``{name: clip, clip_high: 0.28}``, or just
``clip``, becomes the object itself; there is no config class beside it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic_core import PydanticCustomError, to_json

from alignment.errors import UserError

T = TypeVar("T")
C = TypeVar("C")
Evidence = Literal["unit", "end to end", "study"]
REGISTRIES: dict[str, "Registry[Any]"] = {}


def option(description: str, *, unit: str | None = None, **constraints: Any) -> Any:
    """Describes an option inside ``Annotated[type, option("what it does", unit="nats", ge=0)]``.

    Constraints are pydantic's: ``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ``pattern``.
    """
    return Field(description=description, json_schema_extra={"unit": unit} if unit else None, **constraints)


@dataclasses.dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered component and what ``align list`` says of it."""

    name: str
    cls: type[T]
    source: str
    evidence: Evidence

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]

    def options(self) -> list[dict[str, Any]]:
        """Its options: name, type, default, unit, description and constraints, ready for JSON."""
        hints = get_type_hints(self.cls, include_extras=True)
        return [_describe(f, hints[f.name]) for f in dataclasses.fields(self.cls) if f.init]  # pyright: ignore[reportArgumentType]


class Registry(Generic[T]):
    """Components of one kind by name. ``kind`` is plural; ``protocol`` is what each must satisfy.

    ``any_of`` names methods of which each needs at least one, for a kind whose methods are all optional.
    """

    def __init__(self, kind: str, protocol: type[T], doc: str, *, any_of: tuple[str, ...] = ()) -> None:
        self.kind, self.protocol, self.doc, self.any_of = kind, protocol, doc, any_of
        self._entries: dict[str, Entry[T]] = {}
        REGISTRIES[kind] = self

    def register(self, name: str, *, source: str, evidence: Evidence = "unit") -> Callable[[type[C]], type[C]]:
        """Class decorator: makes a frozen dataclass selectable as ``name``.

        Args:
            name: What a recipe says.
            source: Where the method comes from (paper title and arXiv id), or ``"this project"``.
            evidence: The strongest kind of test that covers it.

        Raises:
            TypeError: The class is not a frozen dataclass or lacks a method of the kind's contract.
            UserError: Another class already has the name.
        """

        def decorate(cls: type[C]) -> type[C]:
            params = getattr(cls, "__dataclass_params__", None)
            if params is None or not params.frozen:
                raise TypeError(f"{self.kind} {name!r}: {cls.__name__} must be a @dataclass(frozen=True)")
            has = set(dir(cls)) | {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
            missing = sorted(_required(self.protocol) - has)
            if missing:
                raise TypeError(f"{self.kind} {name!r}: {cls.__name__} lacks {', '.join(missing)}")
            if self.any_of and not has & set(self.any_of):
                raise TypeError(f"{self.kind} {name!r}: {cls.__name__} needs at least one of {', '.join(self.any_of)}")
            known = self._entries.get(name)
            if known is not None and known.cls.__qualname__ != cls.__qualname__:
                there = f"{known.cls.__module__}.{known.cls.__qualname__}"
                raise UserError(f"{self.kind} {name!r} is already {there}; give {cls.__name__} another name")
            cls.__pydantic_config__ = ConfigDict(  # pyright: ignore[reportAttributeAccessIssue]
                extra="forbid", validate_default=True, arbitrary_types_allowed=True, strict=False
            )
            self._entries[name] = Entry(name, cls, source, evidence)  # pyright: ignore[reportArgumentType]
            return cls

        return decorate

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def __getitem__(self, name: str) -> Entry[T]:
        return self._entries[name]

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._entries)

    def name_of(self, component: object) -> str:
        """The name that ``component`` is registered under."""
        return next(e.name for e in self if type(component) is e.cls)

    def build(self, value: Any) -> T:
        """The component that a recipe's value describes: a name, a mapping with ``name``, or an instance.

        Raises:
            PydanticCustomError: No such name, or no name at all.
            pydantic.ValidationError: An option is unknown or has a bad value; pydantic keeps its place.
        """
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            if type(value) in {entry.cls for entry in self}:
                return value  # pyright: ignore[reportReturnType]
            raise PydanticCustomError("component_type", "expected a name or a mapping with 'name'")
        options = dict(value)
        name = options.pop("name", None)
        if not isinstance(name, str) or name not in self._entries:
            ctx = {"given": str(name), "allowed": self.names(), "kind": self.kind}
            missing = "needs a 'name'" if name is None else "'{given}' is not one of the {kind}"
            raise PydanticCustomError("component_name", missing, ctx)  # pyright: ignore[reportArgumentType]
        # Strict JSON rules: a list may become a tuple, but neither the text "5" nor true becomes a number.
        data = to_json(options, inf_nan_mode="constants")
        return TypeAdapter(self._entries[name].cls).validate_json(data, strict=True)

    def dump(self, component: T) -> dict[str, Any]:
        """The mapping that :meth:`build` would turn back into ``component``."""
        options = TypeAdapter(type(component)).dump_python(component, mode="json")
        inner = {name: _dumped(getattr(component, name)) for name in options}
        return {"name": self.name_of(component), **options, **{k: v for k, v in inner.items() if v is not None}}


def component(registry: Registry[Any]) -> Any:
    """Metadata for a recipe field that holds a component: ``Annotated[PolicyLoss, component(policy_losses)]``."""
    return BeforeValidator(registry.build)


def registry_of(value: object) -> "Registry[Any] | None":
    """The registry of the component that ``value`` is; None if it is none."""
    return next((registry for registry in REGISTRIES.values() if type(value) in {e.cls for e in registry}), None)


def _dumped(value: object) -> dict[str, Any] | None:
    """An option that is a component itself, as a recipe writes it; None for any other."""
    registry = registry_of(value)
    return registry.dump(value) if registry is not None else None


def _required(protocol: type) -> set[str]:
    """Members that every component of the kind must have: the protocol's methods and attributes, inherited ones too."""
    members: set[str] = set()
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False):
            members |= {*vars(base), *vars(base).get("__annotations__", {})}
    return {m for m in members if m == "__call__" or not m.startswith("_")}


def _describe(f: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    info = next((m for m in getattr(hint, "__metadata__", ()) if hasattr(m, "json_schema_extra")), None)
    base = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    default = "required" if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING else f.default
    if f.default_factory is not dataclasses.MISSING:
        default = f.default_factory()
    return {
        "name": f.name,
        "type": base.__name__ if isinstance(base, type) else str(base).replace("typing.", ""),
        "default": default,
        "unit": (info.json_schema_extra or {}).get("unit") if info else None,
        "description": info.description if info else "",
        "constraints": [repr(m) for m in info.metadata] if info else [],
    }
